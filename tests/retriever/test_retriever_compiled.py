"""The compiled retriever equals the eager one and compiles a few graphs for packs of all sizes."""

from __future__ import annotations

import copy
import gzip
import json
import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from dragkit.config import resolve_config
from dragkit.data.cache import cache_root
from dragkit.data.padding import with_padding
from dragkit.retriever.retriever import RetrieverOutput
from dragkit.retriever.text_encoder import TextEncoder, find_encoder
from dragkit.trainer.build import build_retriever
from dragkit.trainer.question_dataset import QuestionDataset
from tests.retriever.retriever_cases import double_retriever, make_graph, pack, relation_states

STEPS = 200


def test_compiled_equals_eager_with_gradients(compile_with):
    model, relations = double_retriever(num_instructions=1), relation_states(5)
    twin = copy.deepcopy(model)
    compiled = compile_with(twin, "aot_eager")
    for seed in range(3):
        rng = np.random.default_rng(seed)
        batch = pack([make_graph(rng, 5 + seed, 11 + seed, 5) for _ in range(2 + seed)])
        for net, call in ((model, model), (twin, compiled)):
            net.zero_grad()
            call(batch, relations).fact_logits.pow(2).sum().backward()
        for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(
                a.grad if a.grad is not None else torch.zeros_like(a),
                b.grad if b.grad is not None else torch.zeros_like(b),
                msg=name,
            )


def test_per_instruction_with_dropout_compiles_and_draws_new_masks(compile_with):
    model, relations = double_retriever(message="per_instruction"), relation_states(5)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    batch = pack([make_graph(np.random.default_rng(0), 9, 31, 5) for _ in range(2)])
    compiled = compile_with(model, "aot_eager")
    results = []
    for call, seed in ((model, 1), (compiled, 1), (model, 2)):
        torch.manual_seed(seed)
        model.zero_grad()
        logits = call(batch, relations).fact_logits
        logits.pow(2).sum().backward()
        results.append((logits.detach(), model.instructions.attend.grad.clone()))
    for eager, compiled_result, other_seed in zip(*results, strict=True):
        torch.testing.assert_close(compiled_result, eager)
        assert not torch.allclose(other_seed, eager)
    model.eval()
    with torch.no_grad():
        first = model(batch, relations).fact_logits
        assert torch.equal(first, model(batch, relations).fact_logits)


# (questions, nodes, facts, relations, tokens). torch.compile specialises on equal sizes and on
# sizes of 0 and 1, so the list has all of these.
SIZES = [
    (2, 11, 30, 3, 2),
    (3, 17, 41, 3, 6),
    (2, 19, 37, 3, 3),
    (4, 13, 29, 2, 5),
    (2, 8, 23, 3, 7),
    (6, 21, 33, 4, 8),
    (1, 7, 31, 3, 7),
    (1, 9, 2, 1, 4),
    (1, 2, 1, 1, 1),
    (1, 3, 0, 1, 2),
    (4, 10, 27, 3, 1),
]


@pytest.mark.parametrize("sizes", [SIZES, SIZES[::-1]], ids=["largest first", "smallest first"])
def test_packs_of_all_sizes_share_one_graph(sizes, compile_with):
    model, relations = double_retriever(num_instructions=1), relation_states(5)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = compile_with(model, counter)
    for seed, (questions, nodes, facts, num_relations, tokens) in enumerate(sizes):
        rng = np.random.default_rng(seed)
        graphs = [make_graph(rng, nodes, facts, num_relations, tokens) for _ in range(questions)]
        batch = with_padding(pack(graphs))
        outputs = [call(batch, relations) for call in (compiled, model)]
        for name, ours, expected in zip(RetrieverOutput._fields, *outputs, strict=True):
            torch.testing.assert_close(ours, expected, msg=lambda text, name=name: name + text)
        gradients = []
        for output in outputs:
            model.zero_grad()
            (output.fact_logits.pow(2).sum() + output.node.pow(2).sum()).backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(*gradients)
    assert counter.frame_count == 1


def invented_questions(path: Path) -> Path:
    """Questions with one topic, one fact that touches it, one word, one relation, or no fact."""
    draw = random.Random(5)
    with path.open("w") as file:
        for i in range(STEPS):
            num_facts, num_relations = draw.choice([0, 1, 2, 9, 40]), draw.choice([1, 1, 6])
            facts = [
                [f"e{draw.randint(0, 9)}", f"a.b.r{draw.randrange(num_relations)}", f"e{n}"]
                for n in range(num_facts)
            ]
            topics = ["e0"] * draw.randint(0, 1)
            words = " ".join(draw.choice(["who", "made", "it"]) for _ in range(draw.randint(1, 9)))
            row = {"id": str(i), "question": words, "topic_entities": topics, "triples": facts}
            row |= {"answers": ["e1"], "paths": [facts[:1]] if facts else []}
            file.write(json.dumps(row) + "\n")
    return path


def first_questions(path: Path, data: Path) -> Path:
    with gzip.open(data / "cwq.train.jsonl.gz", "rt") as lines:
        path.write_text("".join(islice(lines, STEPS)))
    return path


@pytest.mark.parametrize("source", ["real", "invented"])
def test_questions_one_at_a_time_share_one_graph(source, compile_with, tmp_path, request):
    """Training has one graph and evaluation, which keeps nothing for a backward, another."""
    path = tmp_path / "questions.jsonl"
    if source == "real":
        first_questions(path, request.getfixturevalue("kgqa_data"))
    else:
        invented_questions(path)
    settings = {"run.phase": 1, "retriever.hidden_dim": 8, "run.compile": True}
    config, _ = resolve_config("tiny", None, settings)
    encoder = TextEncoder(find_encoder(), cache_root(None))
    dataset = QuestionDataset(path, config, encoder, None, 1)
    model, counter = build_retriever(config, encoder), CompileCounter()
    compiled = compile_with(model, counter)
    rows = [[row] for row in range(STEPS)]
    for batch in dataset.load(rows):
        assert compiled(batch, dataset.relations).fact_logits.shape == (batch.graph.num_facts,)
    assert counter.frame_count == 1
    model.eval()
    with torch.no_grad():
        for batch in dataset.load(rows):
            logits = compiled(batch, dataset.relations).fact_logits
            torch.testing.assert_close(logits, model(batch, dataset.relations).fact_logits)
    assert counter.frame_count == 2
