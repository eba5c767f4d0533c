"""The packed, collapsed retriever against an independent one-question implementation in float64.

The reference below follows the equations as published: one question at a time, one fact at a time
in every sum, all 2K sums kept apart, token states projected before they are pooled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch
import torch.fx.experimental._config
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from dragkit.config import RetrieverConfig
from dragkit.data.packed import PackedGraph, QuestionBatch, TokenPack
from dragkit.data.quotient import quotient
from dragkit.model import layers
from dragkit.model.encoder import RelationStates
from dragkit.model.layers import gate_pairs
from dragkit.model.retriever import Retriever
from dragkit.trainer.compile import compile_retriever
from dragkit_kernels import FactGroups, build_fact_orders, row_order

TEXT = 12


def make_graph(rng, num_nodes, num_facts, num_relations, num_tokens=None):
    if num_tokens is None:
        num_tokens = int(rng.integers(1, 6))
    return {
        "head": rng.integers(0, max(num_nodes, 1), num_facts),
        "tail": rng.integers(0, max(num_nodes, 1), num_facts),
        "relation": rng.integers(0, num_relations, num_facts),
        "topics": sorted({int(t) for t in rng.integers(0, max(num_nodes, 1), 2)})
        if num_nodes
        else [],
        "num_nodes": num_nodes,
        "question": torch.tensor(rng.normal(size=(num_tokens, TEXT))),
    }


WORDS = 4


def lengths(num_relations):
    """Tokens of every relation's two texts, 1 to WORDS."""
    return 1 + (torch.arange(2 * num_relations) * 7 % WORDS).view(num_relations, 2)


def pack(graphs, dtype=torch.float64, merge=True) -> QuestionBatch:
    nodes = np.cumsum([0] + [g["num_nodes"] for g in graphs])
    facts = np.cumsum([0] + [len(g["head"]) for g in graphs])
    head = np.concatenate([g["head"] + o for g, o in zip(graphs, nodes, strict=False)])
    tail = np.concatenate([g["tail"] + o for g, o in zip(graphs, nodes, strict=False)])
    used, relation = np.unique(np.concatenate([g["relation"] for g in graphs]), return_inverse=True)
    owner = np.repeat(np.arange(len(graphs)), np.diff(nodes))
    mark = np.zeros(nodes[-1], dtype=bool)
    for g, o in zip(graphs, nodes, strict=False):
        mark[[o + t for t in g["topics"]]] = True
    merged = quotient(head, tail, relation, owner, mark, merge=merge)
    num_nodes, num_rows = len(merged.size), len(merged.head)
    node_graph, row_graph = np.zeros(num_nodes, np.int32), np.zeros(num_rows, np.int32)
    node_graph[merged.node_class] = owner
    row_graph[merged.fact_row] = np.repeat(np.arange(len(graphs)), np.diff(facts))
    topic_row = np.unique(merged.node_class[mark])
    topic = torch.zeros(num_nodes, dtype=dtype)
    for row in topic_row:
        topic[row] = 1 / len(graphs[node_graph[row]]["topics"])
    as_int = lambda a: torch.tensor(np.asarray(a), dtype=torch.int32)  # noqa: E731

    def orders(chosen):
        head, tail, relation, *counts = (as_int(column[chosen]) for column in merged[3:])
        counts = dict(zip(("head_count", "tail_count"), counts, strict=True))
        graph = as_int(row_graph[chosen])
        return build_fact_orders(head, tail, relation, num_nodes, graph, **counts)

    near = np.isin(merged.head, topic_row) | np.isin(merged.tail, topic_row)
    ends = np.cumsum(np.bincount(merged.fact_row, minlength=num_rows))
    longest = max(len(g["question"]) for g in graphs)
    states = torch.zeros(len(graphs), longest, TEXT, dtype=dtype)
    mask = torch.zeros(len(graphs), longest, dtype=torch.bool)
    for i, g in enumerate(graphs):
        states[i, : len(g["question"])] = g["question"].to(dtype)
        mask[i, : len(g["question"])] = True
    graph = PackedGraph(
        orders=orders(np.arange(num_rows)),
        start=orders(np.flatnonzero(near)),
        groups=FactGroups(
            as_int(merged.fact_row),
            as_int([0, *ends]),
            as_int(np.argsort(merged.fact_row, kind="stable")),
        ),
        topic=topic,
        topic_row=as_int(topic_row),
        topic_graph=as_int(node_graph[topic_row]),
        node_count=as_int(merged.size),
        node_graph=as_int(node_graph),
        fact_graph=as_int(np.repeat(np.arange(len(graphs)), np.diff(facts))),
        node_ptr=as_int([0, *np.cumsum(np.bincount(node_graph, minlength=len(graphs)))]),
        fact_ptr=as_int(facts),
        label=torch.zeros(int(facts[-1]), dtype=dtype),
        question_key=torch.arange(len(graphs)),
        num_graphs=len(graphs),
        num_nodes=num_nodes,
        num_facts=int(facts[-1]),
        max_facts=int(np.diff(facts).max()),
    )
    words = lengths(int(max(used, default=0)) + 1)[used].flatten().tolist()
    firsts = [(2 * r + d) * WORDS for r in used for d in (0, 1)]
    rows = [first + t for first, n in zip(firsts, words, strict=True) for t in range(n)]
    return QuestionBatch(
        graph,
        states,
        mask,
        torch.tensor(used, dtype=torch.int64),
        TokenPack(as_int(rows), as_int([0, *np.cumsum(words)]), WORDS),
        None,
        None,
        None,
        tuple(range(len(graphs))),
        num_labelled=0,
    )


def relation_states(num_relations, dtype=torch.float64) -> RelationStates:
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(num_relations, 2, WORDS, TEXT, generator=generator, dtype=dtype)
    mask = torch.arange(WORDS) < lengths(num_relations).unsqueeze(2)
    return RelationStates(states * mask[..., None], mask)


def linear(w, name, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].t() + w[f"{name}.bias"]


def attention(w, states, query):
    y = linear(w, "pooling.project", states)
    return torch.softmax(y @ query, 0) @ y


def reference(w: dict[str, Tensor], g: dict, relations: RelationStates, config) -> Tensor:
    """Fact logits of one question, float64 [E]."""
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
            states = relations.states[r, d][relations.mask[r, d]]
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


def double_retriever(**settings) -> Retriever:
    torch.manual_seed(1)
    config = RetrieverConfig(hidden_dim=8, dropout=0.0, num_reasoning_steps=2, **settings)
    return Retriever(config, TEXT).double()


def star(rng):
    """Equal leaves around a topic, of which one more fact sets one apart: 9 nodes, 4 classes."""
    graph = make_graph(rng, 9, 9, 5)
    graph["head"] = np.array([0] * 8 + [3])
    graph["tail"] = np.array([*range(1, 9), 4])
    graph["relation"] = np.array([2] * 8 + [1])
    return graph | {"topics": [0]}


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("message", ["collapsed", "parity"])
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
    wanted = [reference(plain, g, relations, model.config) for g in graphs]
    sum((a * b).sum() for a, b in zip(wanted, weights, strict=True)).backward()

    # Scores pass through float32 tables, which bounds the agreement of the logits.
    torch.testing.assert_close(logits.double(), torch.cat(wanted), rtol=2e-6, atol=2e-6)
    for name, parameter in model.named_parameters():
        theirs = plain[name].grad
        if theirs is None:
            theirs = torch.zeros_like(plain[name])
        ours = torch.zeros_like(theirs) if parameter.grad is None else parameter.grad
        scale = theirs.abs().max().clamp(min=1e-3)
        assert ((ours - theirs).abs().max() / scale) < 5e-6, name


def test_pairs_are_sorted_once_and_only_for_the_kernels_backward(monkeypatch):
    rng = np.random.default_rng(0)
    graphs = [make_graph(rng, n, e, 5) for n, e in ((0, 0), (6, 14), (3, 0), (4, 9), (0, 0))]
    orders, relations = pack(graphs).graph.orders, torch.zeros(5, 2)
    assert gate_pairs(orders, 5, relations).without_loops() == (None, None)
    # As where Triton runs.
    monkeypatch.setattr(layers, "resolve_backend", lambda op, tensor: "triton")
    with torch.no_grad():
        assert gate_pairs(orders, 5, relations).relation_order is None
    found = gate_pairs(orders, 5, relations)
    wanted = (row_order(found.relation, 6), row_order(found.graph, 5))
    wanted += (row_order(orders.pair_relation, 5), row_order(orders.pair_graph, 5))
    given = (found.relation_order, found.graph_order, *found.without_loops())
    for got, want in zip(given, wanted, strict=True):
        for x, y in zip(got, want, strict=True):
            assert x.dtype == y.dtype == torch.int32 and torch.equal(x, y)


@pytest.mark.parametrize("message", ["collapsed", "parity"])
def test_scores_taken_along_are_those_taken_afterwards(message, monkeypatch):
    """And so are all gradients; with dropout at work nothing is taken along."""
    rng = np.random.default_rng(2)
    batch = pack([make_graph(rng, n, e, 5) for n, e in ((6, 14), (0, 0), (4, 9))])
    model, relations, asked = double_retriever(message=message), relation_states(5), []
    plain = layers.ReasoningLayer.forward

    def forward(self, *arguments, score_weight=None):
        asked.append(score_weight is not None)
        return plain(self, *arguments, score_weight=score_weight)

    monkeypatch.setattr(layers.ReasoningLayer, "forward", forward)
    found = []
    for at_once in (True, False):
        monkeypatch.setattr(Retriever, "_scores_at_once", at_once)
        model.zero_grad()
        logits = model(batch, relations).fact_logits
        logits.pow(2).sum().backward()
        # Of two layers in two stages all but the last of the first stage.
        assert asked == ([True, False, True, True] if at_once else [False] * 4)
        asked.clear()
        found.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
    monkeypatch.undo()
    model.dropout.p = 0.5
    assert not model._scores_at_once and model.eval()._scores_at_once


def test_every_parameter_learns_from_the_logits():
    model = double_retriever()
    model(
        pack([make_graph(np.random.default_rng(0), 6, 20, 5)]), relation_states(5)
    ).fact_logits.pow(2).sum().backward()
    # The last node score only shapes the distribution after the last layer, which nothing reads.
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent <= {"node_score.bias"}


def test_empty_graphs_anywhere_change_nothing():
    rng = np.random.default_rng(3)
    full = [make_graph(rng, 5, 9, 5), make_graph(rng, 7, 16, 5)]
    empty = make_graph(rng, 0, 0, 5)
    model, relations = double_retriever().eval(), relation_states(5)
    wanted = model(pack(full), relations).fact_logits
    for graphs in ([empty, *full], [full[0], empty, full[1]], [*full, empty]):
        torch.testing.assert_close(model(pack(graphs), relations).fact_logits, wanted)


@pytest.mark.parametrize("message", ["collapsed", "parity"])
def test_a_pack_of_one_empty_graph(message):
    empty = make_graph(np.random.default_rng(0), 0, 0, 5, num_tokens=4)
    batch = pack([empty])
    assert batch.question_states.shape == (1, 4, TEXT)
    assert batch.question_mask.all()
    torch.testing.assert_close(batch.question_states[0], empty["question"])
    assert batch.graph.topic.shape == batch.relation_row.shape == (0,)
    assert batch.graph.orders.num_pairs == batch.graph.orders.num_facts == 0
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


@pytest.fixture
def compile_with(monkeypatch) -> Iterator[Callable]:
    """compile_retriever with another backend; the flags it sets are taken back afterwards."""

    def compiled(model: Retriever, backend: object) -> Callable:
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        return compile_retriever(model)

    with (
        torch.fx.experimental._config.patch(use_duck_shape=True),
        # Without the second, Dynamo traces twice: it finds late that a dropout rate is a constant.
        torch._dynamo.config.patch(recompile_limit=8, specialize_float=True),
    ):
        yield compiled


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


def test_parity_with_dropout_compiles_and_is_drawn_anew(compile_with):
    model, relations = double_retriever(message="parity"), relation_states(5)
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
    for want, got, other in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
        assert not torch.allclose(other, want)
    model.eval()
    with torch.no_grad():
        first = model(batch, relations).fact_logits
        assert torch.equal(first, model(batch, relations).fact_logits)


def test_packs_of_all_sizes_share_a_few_graphs(compile_with):
    # (questions, nodes, facts, relations, tokens): as many questions or relations as tokens, as
    # many questions as relations, nothing equal, and sizes of one, which a compiler sets apart.
    sizes = [
        (2, 11, 30, 3, 2),
        (3, 17, 41, 3, 6),
        (2, 19, 37, 3, 3),
        (4, 13, 29, 2, 5),
        (2, 8, 23, 3, 7),
        (6, 21, 33, 4, 8),
        (1, 7, 31, 3, 7),
        (4, 10, 27, 3, 1),
    ]
    model, relations = double_retriever(num_instructions=1), relation_states(5)
    counter = CompileCounter()
    compiled = compile_with(model, counter)
    for seed, (questions, nodes, facts, num_relations, tokens) in enumerate(sizes):
        rng = np.random.default_rng(seed)
        graphs = [make_graph(rng, nodes, facts, num_relations, tokens) for _ in range(questions)]
        batch = pack(graphs)
        torch.testing.assert_close(
            compiled(batch, relations).fact_logits, model(batch, relations).fact_logits
        )
    # One for plain sizes, one for a single question, one for a single token.
    assert 1 <= counter.frame_count <= 3
