"""Under bfloat16 autocast the scores of nodes and facts are float32 products."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dragkit.config import RetrieverConfig
from dragkit.data.packed import PackedGraph, QuestionBatch, RelationStates
from dragkit.retriever import retriever as retriever_module
from dragkit.retriever.retriever import Retriever, RetrieverOutput
from tests.retriever.retriever_cases import TEXT, make_graph, pack, relation_states

WIDTH, TOP = 32, 50


@pytest.fixture
def model() -> Retriever:
    torch.manual_seed(1)
    return Retriever(RetrieverConfig(hidden_dim=WIDTH, dropout=0.0), TEXT)


@pytest.fixture(scope="module")
def batch() -> QuestionBatch:
    rng = np.random.default_rng(3)
    return pack([make_graph(rng, 60, 200, 9), make_graph(rng, 5, 3, 2)], dtype=torch.float32)


@pytest.fixture(scope="module")
def relations() -> RelationStates:
    return relation_states(9, dtype=torch.float32)


def eager(model: Retriever, compile_with: Callable) -> Callable[..., RetrieverOutput]:
    return model


def compiled(model: Retriever, compile_with: Callable) -> Callable[..., RetrieverOutput]:
    return compile_with(model, "aot_eager")


def low(call: Callable, *inputs: object) -> RetrieverOutput:
    with torch.autocast("cpu", torch.bfloat16):
        return call(*inputs)


def exact_logits(output: RetrieverOutput, model: Retriever, graph: PackedGraph) -> Tensor:
    """w . [h_s ; x_r ; h_t] + b in float64, from the representations that the facts have."""
    index = graph.fact_index
    rows = [
        output.node[index.head.long()],
        output.relation[index.fact_pair.long()],
        output.node[index.tail.long()],
    ]
    score = torch.cat(rows, 1).double() @ model.fact_score.weight[0].double()
    return (score + model.fact_score.bias.double())[graph.groups.row.long()]


@pytest.mark.parametrize("form", [eager, compiled])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_logits_are_float32_products(form, training, model, batch, relations, compile_with):
    call = form(model.train(training), compile_with)
    with torch.set_grad_enabled(training):
        output = low(call, batch, relations)
    assert output.node.dtype == torch.bfloat16 and output.fact_logits.dtype == torch.float32
    expected = exact_logits(output, model, batch.graph)
    scale = expected.abs().max()
    assert (output.fact_logits - expected).abs().max() <= 1e-6 * scale
    # bfloat16 would not tell these facts apart.
    assert len(expected.bfloat16().unique()) < len(expected.float().unique())
    order = output.fact_logits.argsort(descending=True, stable=True)
    assert torch.equal(order[:TOP], expected.float().argsort(descending=True, stable=True)[:TOP])


def test_node_scores_are_float32_products(model, batch, relations, monkeypatch):
    softmax, scores = retriever_module.segment_softmax, []

    def recorded(score: Tensor, *args: object, **options: object) -> Tensor:
        scores.append(score)
        return softmax(score, *args, **options)

    original, states = Retriever._node_distribution, []

    def with_states(self: Retriever, h: Tensor, graph: PackedGraph) -> Tensor:
        states.append(h)
        return original(self, h, graph)

    monkeypatch.setattr(retriever_module, "segment_softmax", recorded)
    monkeypatch.setattr(Retriever, "_node_distribution", with_states)
    low(model, batch, relations)
    assert len(scores) == model.config.num_stages * (model.config.num_reasoning_steps - 1) > 0
    for h, score in zip(states, scores, strict=True):
        assert h.dtype == torch.bfloat16 and score.dtype == torch.float32
        expected = h.double() @ model.node_score.weight[0].double() + model.node_score.bias
        assert (score - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_training_and_evaluation_rank_alike(model, batch, relations):
    trained = low(model.train(), batch, relations).fact_logits
    with torch.no_grad():
        evaluated = low(model.eval(), batch, relations).fact_logits
    assert torch.equal(trained, evaluated)
    full = model(batch, relations).fact_logits
    # The representations are bfloat16, so the logits are as near as those are.
    assert 0 < (trained - full).norm() <= 2e-2 * full.norm()
