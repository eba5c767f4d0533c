"""The packed, collapsed retriever against an independent implementation in float64.

The reference follows the published equations: one question at a time, one fact at a time in every
sum, 2K separate sums, and token states that are projected before they are pooled.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from dragkit.data.packed import RelationStates
from dragkit.retriever import layers
from dragkit.retriever.layers import ReasoningLayer, gate_pairs
from dragkit_kernels import grouped_index
from tests.retriever.retriever_cases import (
    TEXT,
    double_retriever,
    make_graph,
    pack,
    relation_states,
)


def linear(w, name, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].t() + w[f"{name}.bias"]


def attention(w, states, query):
    y = linear(w, "pooling.project", states)
    return torch.softmax(y @ query, 0) @ y


def reference(w: dict[str, Tensor], g: dict, relations: RelationStates, config) -> Tensor:
    """Computes the fact logits of one question, float64 [E]."""
    words = linear(w, "pooling.project", g["question"])
    previous, instructions = torch.zeros_like(words[0]), []
    for k in range(config.num_instructions):
        q = linear(w, f"instructions.query.{k}", words[0])
        joined = torch.cat([previous, q, q - previous, q * previous])
        z = linear(w, "instructions.combine", joined)
        weight = torch.softmax((z * words) @ w["instructions.attend"], 0)
        previous = weight @ words
        instructions.append(previous)
    x = {}
    for r in set(g["relation"].tolist()):
        for d in (0, 1):
            first, end = relations.ptr[2 * r + d : 2 * r + d + 2].tolist()
            states = relations.states[first:end]
            x[r, d] = attention(w, states, w["pooling.relation_query"])
    facts = list(zip(g["head"].tolist(), g["relation"].tolist(), g["tail"].tolist(), strict=True))
    width = config.hidden_dim
    h = [torch.zeros(width, dtype=torch.float64) for _ in range(g["num_nodes"])]
    for s, r, t in facts:
        h[t] = h[t] + linear(w, "start", x[r, 0])
        h[s] = h[s] + linear(w, "start", x[r, 0])
    h = [torch.relu(v) for v in h]
    for stage in range(config.num_stages):
        if stage:
            y = sum(h[t] for t in g["topics"])
            for k, i in enumerate(instructions):
                f = torch.cat([i, y, i - y])
                gate = torch.sigmoid(f @ w["revision.gate"][k])
                instructions[k] = gate * (f @ w["revision.value"][k]) + (1 - gate) * i
        p = [1 / len(g["topics"]) if v in g["topics"] else 0.0 for v in range(g["num_nodes"])]
        for j in range(config.num_reasoning_steps):
            name = f"layers.{j}"
            own = linear(w, f"{name}.relation", w["self_relation"])
            sums = []
            for v in range(g["num_nodes"]):
                for i in instructions:
                    loop = p[v] * torch.relu(own * i)
                    forward, inverse = loop, loop
                    for s, r, t in facts:
                        if t == v:
                            u = linear(w, f"{name}.relation", x[r, 0])
                            forward = forward + p[s] * torch.relu(u * i)
                        if s == v:
                            u = linear(w, f"{name}.relation", x[r, 1])
                            inverse = inverse + p[t] * torch.relu(u * i)
                    sums += [forward, inverse]
            per_node = 2 * config.num_instructions
            h = [
                torch.relu(
                    linear(
                        w,
                        f"{name}.update",
                        torch.cat([h[v], *sums[v * per_node : (v + 1) * per_node]]),
                    )
                )
                for v in range(g["num_nodes"])
            ]
            p = torch.softmax(torch.stack([linear(w, "node_score", v)[0] for v in h]), 0)
    scores = [linear(w, "fact_score", torch.cat([h[s], x[r, 0], h[t]]))[0] for s, r, t in facts]
    return torch.stack(scores) if scores else torch.zeros(0, dtype=torch.float64)


def star(rng):
    """Makes a topic with 8 leaves, one of which has a further fact: 9 nodes, 4 merged nodes."""
    graph = make_graph(rng, 9, 9, 5)
    graph["head"] = np.array([0] * 8 + [3])
    graph["tail"] = np.array([*range(1, 9), 4])
    graph["relation"] = np.array([2] * 8 + [1])
    return graph | {"topics": [0]}


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("message", ["fused", "per_instruction"])
@pytest.mark.parametrize("instructions,stages", [(1, 1), (2, 2), (3, 2)])
def test_equals_one_question_at_a_time(message, instructions, stages, merge):
    rng = np.random.default_rng(instructions)
    graphs = [make_graph(rng, n, e, 5) for n, e in ((6, 14), (1, 2), (4, 3), (9, 20))]
    graphs.insert(1, star(rng))
    relations = relation_states(5)
    model = double_retriever(message=message, num_instructions=instructions, num_stages=stages)
    weights = [torch.randn(len(g["head"]), dtype=torch.float64) for g in graphs]

    batch = pack(graphs, merge=merge)
    assert batch.graph.num_nodes < 29 if merge else batch.graph.num_nodes == 29
    logits = model(batch, relations).fact_logits
    (logits * torch.cat(weights)).sum().backward()
    plain = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    expected = [reference(plain, g, relations, model.config) for g in graphs]
    sum((a * b).sum() for a, b in zip(expected, weights, strict=True)).backward()

    # The tables of the scores are float32, which limits the accuracy of the logits.
    torch.testing.assert_close(logits.double(), torch.cat(expected), rtol=2e-6, atol=2e-6)
    for name, parameter in model.named_parameters():
        grad, expected_grad = (
            torch.zeros_like(p) if p.grad is None else p.grad for p in (parameter, plain[name])
        )
        scale = expected_grad.abs().max().clamp(min=1e-3)
        assert ((grad - expected_grad).abs().max() / scale) < 5e-6, name


def test_pairs_are_grouped_only_for_the_backward_of_the_kernels(monkeypatch):
    rng = np.random.default_rng(0)
    graphs = [make_graph(rng, n, e, 5) for n, e in ((0, 0), (6, 14), (3, 0), (4, 9), (0, 0))]
    fact_index, relations = pack(graphs).graph.fact_index, torch.zeros(5, 2)
    assert gate_pairs(fact_index, 5, relations).without_self_loops() == (None, None)
    # Groupings are made where the Triton kernels run.
    monkeypatch.setattr(layers, "resolve_backend", lambda op, tensor: "triton")
    with torch.no_grad():
        assert gate_pairs(fact_index, 5, relations).pairs_by_relation is None
    pairs = gate_pairs(fact_index, 5, relations)
    expected = [
        grouped_index(rows, num_rows)
        for rows, num_rows in (
            *((pairs.relation, 6), (pairs.graph, 5)),
            *((fact_index.pair_relation, 5), (fact_index.pair_graph, 5)),
        )
    ]
    actual = (pairs.pairs_by_relation, pairs.pairs_by_graph, *pairs.without_self_loops())
    for x, y in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        assert x.dtype == y.dtype == torch.int32 and torch.equal(x, y)


@pytest.mark.parametrize("message", ["fused", "per_instruction"])
def test_dropout_reaches_states_and_messages(message):
    """With dropout 1 a layer returns relu(bias). In evaluation it does not."""
    layer = ReasoningLayer(8, 2, 1.0, per_instruction=message == "per_instruction").double()
    graph = pack(
        [make_graph(np.random.default_rng(0), n, e, 5) for n, e in ((6, 14), (4, 9))]
    ).graph
    relation = torch.randn(2, 6, 8, dtype=torch.float64)
    pairs = gate_pairs(graph.fact_index, 2, relation[0, :-1])
    h, instruction = torch.randn(len(graph.topic_prob), 8).double(), torch.randn(2, 2, 8).double()
    p = torch.ones_like(graph.topic_prob)
    arguments = (
        h,
        p,
        layer.prepare(relation),
        instruction,
        graph.fact_index,
        pairs,
        graph.node_graph,
    )
    bias = torch.relu(layer.update.bias).expand_as(h)
    torch.testing.assert_close(layer(*arguments), bias)
    assert not torch.allclose(layer.eval()(*arguments), bias)
    # Without dropout the messages alone change the result.
    layer.train().dropout.p = 0.0
    assert not torch.allclose(layer(torch.zeros_like(h), *arguments[1:]), bias)


def test_every_parameter_learns_from_the_logits():
    model = double_retriever()
    model(
        pack([make_graph(np.random.default_rng(0), 6, 20, 5)]), relation_states(5)
    ).fact_logits.pow(2).sum().backward()
    # The bias of the node score cancels in the softmax.
    without_grad = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without_grad <= {"node_score.bias"}


def test_empty_graphs_anywhere_change_nothing():
    rng = np.random.default_rng(3)
    full = [make_graph(rng, 5, 9, 5), make_graph(rng, 7, 16, 5)]
    empty = make_graph(rng, 0, 0, 5)
    model, relations = double_retriever().eval(), relation_states(5)
    expected = model(pack(full), relations).fact_logits
    for graphs in ([empty, *full], [full[0], empty, full[1]], [*full, empty]):
        torch.testing.assert_close(model(pack(graphs), relations).fact_logits, expected)


@pytest.mark.parametrize("message", ["fused", "per_instruction"])
def test_a_pack_of_one_empty_graph(message):
    empty = make_graph(np.random.default_rng(0), 0, 0, 5, num_tokens=4)
    batch = pack([empty])
    assert batch.question_states.shape == (1, 4, TEXT)
    assert batch.question_mask.all()
    torch.testing.assert_close(batch.question_states[0], empty["question"])
    assert batch.graph.topic_prob.shape == batch.relation_row.shape == (0,)
    assert batch.graph.fact_index.num_pairs == batch.graph.fact_index.num_facts == 0
    model = double_retriever(message=message)
    out = model(batch, relation_states(5))
    assert out.fact_logits.shape == (0,)
    assert out.node.shape == out.relation.shape == (0, 8)
    out.fact_logits.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and not any(g.any() or g.isnan().any() for g in gradients)


def test_a_shuffled_pack_gives_shuffled_scores():
    rng = np.random.default_rng(4)
    graphs = [make_graph(rng, 6, 12, 5) for _ in range(3)]
    model, relations = double_retriever().eval(), relation_states(5)
    first = model(pack(graphs), relations).fact_logits.split(12)
    second = model(pack(graphs[::-1]), relations).fact_logits.split(12)
    for a, b in zip(first, second[::-1], strict=True):
        torch.testing.assert_close(a, b)
