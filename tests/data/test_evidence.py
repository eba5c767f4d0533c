"""Facts that others judged relevant: walks against their enumeration, and what a store keeps."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from dragkit.data.collate import PackedCollator
from dragkit.data.evidence import EVIDENCE, RELATION_PATH
from dragkit.data.question_file import Question, read_questions
from dragkit.data.question_row import Triple
from dragkit.data.relations import RelationVocab
from dragkit.data.store import PackedStore
from dragkit.data.subgraph import build_subgraph

FACTS = [["a", "r", "b"], ["a", "s", "b"], ["b", "r", "c"], ["c", "r", "c"], ["d", "r", "a"]]


def marked(question: Question, bit: int) -> set[Triple]:
    vocab = RelationVocab()
    graph = build_subgraph(question, vocab)
    return {
        (graph.names[h], vocab.names[r], graph.names[t])
        for h, r, t, bits in zip(
            graph.head, graph.relation, graph.tail, graph.relevance.bits, strict=True
        )
        if bits & bit
    }


def walks(facts: Sequence[Triple], node: str, chain: Sequence[str]) -> Iterator[list[Triple]]:
    """Enumerates all walks from a node along a chain."""
    if not chain:
        yield []
        return
    name, *others = chain
    for fact in facts:
        head, relation, tail = fact
        source, target = (tail, head) if name.endswith("^-1") else (head, tail)
        if source == node and relation + "^-1" * name.endswith("^-1") == name:
            for walk in walks(facts, target, others):
                yield [fact, *walk]


def end_of(walk: Sequence[Triple], chain: Sequence[str], start: str) -> str:
    node = start
    for (head, _, tail), name in zip(walk, chain, strict=True):
        node = head if name.endswith("^-1") else tail
    return node


def facts_on_walks(question: Question) -> set[Triple]:
    names = {name for head, _, tail in question.triples for name in (head, tail)}
    ends = names & set(question.answers) or names
    return {
        fact
        for topic in names & set(question.topics)
        for chain in question.relation_paths
        for walk in walks(question.triples, topic, chain)
        if end_of(walk, chain, topic) in ends
        for fact in walk
    }


@pytest.mark.parametrize("seed", range(80))
def test_walks_equal_enumeration(seed: int, question: Callable[..., Question]) -> None:
    draw = random.Random(seed)
    names = [f"e{i}" for i in range(draw.randint(2, 9))]
    steps = ["r0", "r1", "r0^-1", "r1^-1", "unknown"]
    example = question(
        sorted(
            {
                (draw.choice(names), f"r{draw.randrange(2)}", draw.choice(names))
                for _ in range(draw.randint(1, 25))
            }
        ),
        topics=tuple(draw.sample([*names, "gone"], draw.randint(1, 2))),
        answers=tuple(draw.sample([*names, "gone"], draw.randint(0, 2))),
        relation_paths=tuple(
            tuple(draw.choices(steps, [4, 4, 4, 4, 1], k=draw.randint(0, 4)))
            for _ in range(draw.randint(1, 3))
        ),
    )
    assert marked(example, RELATION_PATH) == facts_on_walks(example)


@pytest.mark.parametrize(
    ("chain", "topics", "answers", "expected"),
    [
        (["r", "r"], "a", "c", ["a r b", "b r c"]),
        (["r", "r", "r"], "a", "c", ["a r b", "b r c", "c r c"]),
        (["s"], "a", "b", ["a s b"]),
        (["r^-1"], "a", "d", ["d r a"]),
        (["r^-1", "r"], "b", "b", ["a r b"]),
        # The chain is not walked against its direction.
        (["r"], "b", "a", []),
        # Without an answer in the graph a walk ends anywhere.
        (["r"], "a", "elsewhere", ["a r b"]),
        (["r"], "a", "", ["a r b"]),
        # An answer that the chain does not reach leaves no walk.
        (["r"], "a", "d", []),
        (["r"], "elsewhere", "b", []),
        (["gone", "r"], "a", "b", []),
        ([], "a", "a", []),
    ],
)
def test_walks_by_hand(
    chain: list[str],
    topics: str,
    answers: str,
    expected: list[str],
    question: Callable[..., Question],
) -> None:
    example = question(
        FACTS,
        topics=(topics,),
        answers=tuple(answers.split()),
        relation_paths=(tuple(chain),),
    )
    assert marked(example, RELATION_PATH) == {tuple(fact.split()) for fact in expected}
    assert marked(example, EVIDENCE) == set()


def test_both_judgements_of_one_fact(question: Callable[..., Question]) -> None:
    evidence = (("a", "r", "b"), ("b", "r", "a"), ("a", "t", "b"), ("x", "r", "b"), ("d", "r", "a"))
    example = question(FACTS, topics=("a",), evidence=evidence, relation_paths=(("r",),))
    assert marked(example, EVIDENCE) == {("a", "r", "b"), ("d", "r", "a")}
    assert marked(example, RELATION_PATH) == {("a", "r", "b")}


def test_a_store_tells_no_judgement_from_one_that_marks_nothing(
    write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    row = {"question": "q", "triples": FACTS, "topic_entities": "a", "answer": "c"}
    judgements = [
        ({}, None, None),
        ({"evidence": None, "relation_paths": None}, None, None),
        ({"evidence": [], "relation_paths": []}, None, None),
        ({"evidence": [["x", "r", "y"]], "relation_paths": [["gone"]]}, (), ()),
        ({"evidence": [["d", "r", "a"], ["a", "s", "b"]]}, (1, 4), None),
        ({"relation_paths": [["s", "r"], ["r", "r"]]}, None, (0, 1, 2)),
        ({"evidence": FACTS, "triples": []}, (), None),
    ]
    path = write_rows([row | fields for fields, _, _ in judgements])
    store = PackedStore.build_or_open(path, cache_dir=tmp_path)
    questions = [store.question(row) for row in range(len(store))]
    assert questions[0].triples == tuple(map(tuple, FACTS))
    assert [(q.evidence, q.relation_path_facts) for q in questions] == [
        (evidence, path_facts) for _, evidence, path_facts in judgements
    ]
    assert (store.relevance.dtype, store.judged.dtype) == (np.uint8, np.uint8)
    assert len(store.relevance) == len(store.labels)


def test_names_are_kept_as_given(write_rows: Callable[..., Path]) -> None:
    row = {"question": "q", "triples": FACTS}
    fields = {"evidence": [["a", "r", "b"]], "relation_paths": [["r", "s^-1"], []]}
    with_fields, without = read_questions(write_rows([row | fields, row])).questions
    assert with_fields.evidence == (("a", "r", "b"),)
    assert with_fields.relation_paths == (("r", "s^-1"), ())
    assert without.evidence == without.relation_paths == ()


def test_training_sees_no_judgement(
    random_rows: Callable[..., list[dict]],
    write_rows: Callable[..., Path],
    tmp_path: Path,
    collator: Callable[..., PackedCollator],
) -> None:
    rows = random_rows(20, seed=3)
    judged = [
        row | {"evidence": row["triples"][:2], "relation_paths": [["dom.type.r0"]]} for row in rows
    ]
    plain, with_judgements = (
        collator(PackedStore.build_or_open(write_rows(r, name), cache_dir=tmp_path))(range(20))
        for r, name in ((rows, "plain.jsonl"), (judged, "judged.jsonl"))
    )
    for actual, expected in zip(with_judgements.tensors(), plain.tensors(), strict=True):
        assert torch.equal(actual, expected)
