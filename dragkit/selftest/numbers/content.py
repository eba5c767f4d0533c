"""Questions with odd content: trained on, answered, counted, and the same in any order."""

from __future__ import annotations

import copy
import math
import random
import resource
import time
from collections import Counter
from pathlib import Path

import torch

from dragkit.eval.types import Prediction
from dragkit.selftest.numbers.small_joint import SmallJoint, invented_rows
from dragkit.selftest.outcome import Outcome, require
from dragkit_kernels import build_fact_index

# Each changes a question, whose kind adds to these counts of the packed file.
_ODD: dict[str, tuple[dict, tuple[str, ...]]] = {
    "no topic": (
        {"topic_entities": [], "paths": []},
        ("no_topic", "topic_missing", "labels_none"),
    ),
    "an unknown topic": (
        {"topic_entities": ["Atlantis"], "paths": []},
        ("topic_missing", "labels_none"),
    ),
    "no answer": ({"answer": []}, ("no_answer",)),
    "an answer outside of the graph": ({"answer": "Atlantis", "paths": []}, ("labels_none",)),
    "10,000 answers": ({"answer": [f"Or{n}" for n in range(10_000)]}, ()),
    "an empty question": ({"question": ""}, ("empty_question",)),
    "an empty graph": ({"triples": []}, ("empty_graph", "labels_none")),
    "one node": (
        {"triples": [["Oria", "twin", "Oria"]], "topic_entities": ["Oria"], "answer": "Melon"},
        ("labels_none",),
    ),
    "one fact": (
        {"triples": [["Oria", "twin", "Melon"]], "topic_entities": ["Oria"], "answer": "Melon"},
        (),
    ),
}
_CSR_SECONDS, _CSR_BYTES = 2.0, 400e6


def odd_content(outcome: Outcome, root: Path) -> None:
    """Trains on questions that lack something, and answers them. Each kind is counted.

    Args:
        outcome: counts the kinds and their counts.
        root: folder of the questions.
    """
    usual = invented_rows(root, 4)
    contradiction = {"answer": [usual[0]["triples"][1][0]]}
    changes = {**_ODD, "an answer that contradicts another question": (contradiction, ())}
    rows = [usual[0] | {"id": kind} | change for kind, (change, _) in changes.items()]
    toy = SmallJoint(root, [*usual, *rows], **{"sampler.k_facts": 30})
    summary = toy.dataset.store.summary
    expected = Counter(name for _, counted in changes.values() for name in counted)
    for number, kind in enumerate(changes, len(usual)):
        with outcome.case(kind):
            (output,) = toy.trainer.train_step([toy.batch([1, 2, 3, number])])
            require(math.isfinite(float(output.loss)), "the loss is not finite")
            predictions = toy.phase.predict(toy.batch([number]), toy.dataset.relations)
            require(len(predictions) == 1, "it is not answered")
    for name in expected:
        with outcome.case(f"the count {name}"):
            require(summary[name] == expected[name], f"{summary[name]}, not {expected[name]}")


def _scores(toy: SmallJoint, row: int, prediction: Prediction) -> dict[tuple[str, ...], float]:
    triples = toy.dataset.store.question(row).triples
    ranked = zip(prediction.ranked, prediction.probability, strict=True)
    return {triples[fact]: probability for fact, probability in ranked}


def order_of_facts(outcome: Outcome, root: Path, *, count: int) -> None:
    """Shuffles and repeats facts. All scores and answers stay the same, bit for bit.

    Args:
        outcome: counts the questions, once for each kind of change.
        root: folder of the questions.
        count: number of questions.
    """
    draw, rows = random.Random(9), invented_rows(root, count)
    toy = SmallJoint(root, rows)
    state = copy.deepcopy(toy.phase.trainable_state())
    batch = toy.batch(range(count))
    before = toy.phase.predict(batch, toy.dataset.relations)
    # The relations keep their order, so that their table stays the same.
    first = {"id": "relations", "question": "q", "topic_entities": ["a"], "answer": ["b"]}
    names = toy.dataset.store.relation_names
    first["triples"] = [["a", name, "b"] for name in names]
    for kind in ("shuffled", "repeated", "shuffled and repeated"):
        changed = copy.deepcopy(rows)
        for row in changed:
            if "repeated" in kind:
                row["triples"] += draw.choices(row["triples"], k=5)
            if "shuffled" in kind:
                draw.shuffle(row["triples"])
        other = SmallJoint(root, [first, *changed])
        for name, tensor in other.phase.trainable_state().items():
            tensor.copy_(state[name])
        after = other.phase.predict(other.batch(range(1, count + 1)), other.dataset.relations)
        for row in range(count):
            with outcome.case(f"question {row}, {kind}"):
                same = _scores(toy, row, before[row]) == _scores(other, row + 1, after[row])
                require(same, "other scores")
                require(before[row].text == after[row].text, "another answer")


def large_graph(outcome: Outcome, *, num_facts: int) -> None:
    """Sorts the facts of one graph for the ops, within 2 seconds and 400 MB for a million facts.

    Args:
        outcome: counts time and memory.
        num_facts: number of facts. A tenth as many relations and half as many nodes are drawn.
    """
    generator = torch.Generator().manual_seed(1)

    def drawn(high: int) -> torch.Tensor:
        return torch.randint(high, (num_facts,), dtype=torch.int32, generator=generator)

    head, tail, relation = drawn(num_facts // 2), drawn(num_facts // 2), drawn(num_facts // 10)
    graph = torch.zeros(num_facts, dtype=torch.int64)
    before, began = _peak_bytes(), time.process_time()
    index = build_fact_index(head, tail, relation, num_facts // 2, graph)
    seconds = time.process_time() - began
    share = num_facts / 1e6
    with outcome.case("time"):
        require(seconds <= _CSR_SECONDS * max(share, 0.2), f"{seconds:.2f} s")
    with outcome.case("memory"):
        size = max(_peak_bytes() - before, sum(tensor.nbytes for tensor in index))
        require(size <= _CSR_BYTES * share, f"{size / 1e6:.0f} MB")
    outcome.notes.append(f"{num_facts} facts are sorted in {seconds:.2f} s, {size / 1e6:.0f} MB")


def _peak_bytes() -> float:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
