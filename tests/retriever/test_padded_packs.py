"""Padded packs against plain ones: scores, loss and gradients of whole retrievers, and every op."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.fx.experimental._config
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from dragkit.config import RetrieverConfig
from dragkit.data.collate import PackedCollator
from dragkit.data.packed import QuestionBatch
from dragkit.data.padding import BUCKET_GROWTH, Buckets, Capacity, pad_batch, required_capacity
from dragkit.data.store import PackedStore
from dragkit.retriever.losses import retrieval_loss
from dragkit.retriever.retriever import Retriever
from dragkit.retriever.text_encoder import RelationStates
from dragkit_kernels import gumbel_topk, segment_softmax, top_facts

TEXT, WORDS, QUESTIONS = 12, 4, 40
# Store rows by what is wanted of them, see `write_questions`.
EMPTY, ONE_FACT, STAR = 0, 1, 2


def write_questions(path: Path) -> Path:
    """Random multigraphs; first an empty one, one of one fact and one of many equal leaves."""
    draw = random.Random(3)
    leaves = [["e0", "dom.type.r1", f"e{n}"] for n in range(1, 12)]
    graphs: list[list[list[str]]] = [[], [["e0", "dom.type.r0", "e1"]], leaves]
    while len(graphs) < QUESTIONS:
        names = [f"e{n}" for n in range(draw.randint(1, 14))]
        size = draw.choice([0, 1, draw.randint(2, 30), draw.randint(2, 30)])
        ends = lambda names=names: draw.choice(names)  # noqa: E731
        graphs.append([[ends(), f"dom.type.r{draw.randrange(7)}", ends()] for _ in range(size)])
    lines = []
    for number, triples in enumerate(graphs):
        asked = {
            "id": f"q{number}",
            "question": f"question {number}",
            "topic_entities": ["e0"] if number % 5 else ["nowhere"],
            "answer": ["e1"],
            "paths": [[triples[0][0], triples[0][2]]] if triples else [],
            "triples": triples,
        }
        lines.append(json.dumps(asked))
    path.write_text("\n".join(lines) + "\n")
    return path


class States:
    """Token states of questions of 1 to 5 tokens."""

    def rows(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([1 + row % 5 for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        states = [torch.Generator().manual_seed(row) for row in rows]
        full = torch.stack([torch.randn(mask.shape[1], TEXT, generator=g) for g in states])
        return full * mask.unsqueeze(2), mask


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PackedStore:
    folder = tmp_path_factory.mktemp("padded")
    return PackedStore.build_or_open(write_questions(folder / "q.jsonl"), cache_dir=folder)


@pytest.fixture(scope="module")
def relations(store: PackedStore) -> RelationStates:
    lengths = 1 + torch.arange(2 * store.num_relations) * 7 % WORDS
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(len(lengths), WORDS, TEXT, generator=generator)
    return RelationStates(states[torch.arange(WORDS) < lengths[:, None]], ptr)


@pytest.fixture(scope="module")
def collate(store: PackedStore, relations: RelationStates) -> PackedCollator:
    return PackedCollator(store, States(), relations.ptr)


def batches_of(collate: PackedCollator) -> dict[str, QuestionBatch]:
    draw = random.Random(1)
    mixed = {f"mixed{n}": draw.sample(range(QUESTIONS), n + 1) for n in range(8)}
    rows = {
        "empty": [EMPTY],
        "one fact": [ONE_FACT],
        "star": [STAR],
        "empty first": [EMPTY, STAR, 7],
        "empty amid": [STAR, EMPTY, 7],
        "empty last": [STAR, 7, EMPTY],
        "only empty": [EMPTY, EMPTY, EMPTY],
    }
    return {name: collate(chosen) for name, chosen in (rows | mixed).items()}


def roomy(need: Capacity) -> Capacity:
    return Capacity(*(size + 2 + place for place, size in enumerate(need)))


def retriever(dtype: torch.dtype = torch.float32, **settings: object) -> Retriever:
    torch.manual_seed(1)
    settings = {"hidden_dim": 16, "dropout": 0.0, "num_reasoning_steps": 2} | settings
    return Retriever(RetrieverConfig(**settings), TEXT).to(dtype)


def cast(batch: QuestionBatch, dtype: torch.dtype) -> QuestionBatch:
    return batch.with_tensors(t.to(dtype) if t.is_floating_point() else t for t in batch.tensors())


def step(
    model: Retriever, call: Callable, batch: QuestionBatch, relations: RelationStates
) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """Logits, loss, and gradients by name."""
    model.zero_grad()
    graph = batch.graph
    logits = call(batch, relations).fact_logits
    loss = retrieval_loss(logits, graph.label, graph.fact_ptr, rho=0.7, margin=1.0)
    loss.backward()
    return logits, loss, {name: p.grad for name, p in model.named_parameters()}


def assert_same_step(plain: tuple, padded: tuple, facts: int, limit: float) -> None:
    torch.testing.assert_close(padded[0][:facts], plain[0], rtol=limit, atol=limit)
    torch.testing.assert_close(padded[1], plain[1], rtol=limit, atol=limit)
    assert plain[2].keys() == padded[2].keys()
    for name, wanted in plain[2].items():
        ours = padded[2][name]
        assert (ours is None) == (wanted is None), name
        if wanted is not None:
            scale = wanted.abs().max().clamp(min=1e-2)
            assert ((ours - wanted).abs().max() / scale) <= limit, name


@pytest.mark.parametrize("dtype,limit", [(torch.float32, 2e-6), (torch.float64, 1e-6)])
@pytest.mark.parametrize("message", ["fused", "per_instruction"])
def test_a_padded_pack_gives_the_same_step(collate, relations, message, dtype, limit):
    model = retriever(dtype, message=message, gate_relation_by_instruction=True)
    states = RelationStates(relations.states.to(dtype), relations.ptr)
    for name, batch in batches_of(collate).items():
        facts = batch.graph.num_facts
        plain = step(model, model, cast(batch, dtype), states)
        plain = (plain[0].clone(), plain[1], copy.deepcopy(plain[2]))
        need = required_capacity(batch)
        for capacity in (need, roomy(need), Capacity(*(3 * size for size in need))):
            padded = pad_batch(batch, capacity)
            assert required_capacity(padded) == Capacity(*(size + 1 for size in capacity)), name
            ours = step(model, model, cast(padded, dtype), states)
            assert ours[0].shape == (capacity.facts,)
            assert_same_step(plain, ours, facts, limit)


def test_padding_changes_no_bit_of_the_logits_of_a_float64_model(collate, relations):
    """In float32 a product of matrices may round by how many rows it has; here the score's own
    rounding to float32 hides that."""
    model = retriever(torch.float64)
    states = RelationStates(relations.states.double(), relations.ptr)
    for batch in batches_of(collate).values():
        plain = step(model, model, cast(batch, torch.float64), states)
        padded = pad_batch(batch, roomy(required_capacity(batch)))
        ours = step(model, model, cast(padded, torch.float64), states)
        assert torch.equal(ours[0][: batch.graph.num_facts], plain[0])


def test_no_gradient_comes_from_what_was_added(collate, relations):
    """Unused rows of every input: their states could be anything."""
    model = retriever()
    batch = batches_of(collate)["mixed5"]
    padded = pad_batch(batch, roomy(required_capacity(batch)))
    graph, kept = padded.graph, {}
    states = padded.question_states.requires_grad_()
    topic = graph.topic_prob.requires_grad_()

    def keep(name: str) -> Callable:
        def hook(module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
            # Without dropout the last layer's scores carry the gradient to its states.
            kept[name] = output[-1] if isinstance(output, tuple) else output
            kept[name].retain_grad()

        return hook

    model.start.register_forward_hook(keep("relation"))
    model.layers[-1].register_forward_hook(keep("node"))
    model.instructions.register_forward_hook(keep("instruction"))
    step(model, model, padded, relations)
    plain = batch.graph
    assert not states.grad[plain.num_graphs :].any()
    assert not states.grad[~padded.question_mask].any()
    assert not topic.grad[plain.num_nodes :].any()
    assert not kept["relation"].grad[batch.relation_row.shape[0] :].any()
    assert not kept["node"].grad[plain.num_nodes :].any()
    assert not kept["instruction"].grad[plain.num_graphs :].any()
    assert states.grad.any() and topic.grad.any() and kept["node"].grad.any()


def test_ops_over_graphs_see_only_real_rows(collate):
    batch = batches_of(collate)["mixed6"]
    padded = pad_batch(batch, roomy(required_capacity(batch)))
    plain, graph = batch.graph, padded.graph
    score = torch.randn(graph.num_nodes, requires_grad=True)
    p = segment_softmax(score, graph.node_ptr, count=graph.node_count)
    wanted = segment_softmax(score[: plain.num_nodes], plain.node_ptr, count=plain.node_count)
    assert torch.equal(p[: plain.num_nodes], wanted) and not p[plain.num_nodes :].any()
    p.square().sum().backward()
    assert not score.grad[plain.num_nodes :].any() and score.grad.any()

    logits = torch.randn(graph.num_facts)
    for choose in (
        lambda logits, g: top_facts(logits, g.fact_ptr, 4, threshold=0.01, max_facts=g.max_facts),
        lambda logits, g: gumbel_topk(
            logits,
            g.fact_ptr,
            4,
            temperature=0.5,
            seed=torch.tensor(9),
            question_key=g.question_key,
            mode="bernoulli",
            estimator="binary_concrete",
            max_facts=g.max_facts,
        ),
    ):
        ours, theirs = choose(logits, graph), choose(logits[: plain.num_facts], plain)
        for name in ("index", "gate", "count"):
            mine, wanted = getattr(ours, name), getattr(theirs, name)
            assert torch.equal(mine[: plain.num_graphs], wanted), name
        torch.testing.assert_close(ours.soft[: plain.num_facts], theirs.soft)
        assert (ours.index[plain.num_graphs :] == -1).all()


def test_the_padding_is_where_it_says(collate):
    batch = batches_of(collate)["mixed4"]
    capacity = roomy(required_capacity(batch))
    padded = pad_batch(batch, capacity)
    graph, plain = padded.graph, batch.graph
    assert (graph.num_graphs, graph.num_nodes, graph.num_facts) == (
        capacity.graphs,
        capacity.nodes,
        capacity.facts,
    )
    assert graph.max_facts >= plain.max_facts
    for fact_index, before in (
        (graph.fact_index, plain.fact_index),
        (graph.topic_facts, plain.topic_facts),
    ):
        for name in ("tail_ptr", "head_ptr", "pair_ptr"):
            ptr = getattr(fact_index, name)
            assert (ptr.diff() >= 0).all() and ptr[-1] == before.num_facts
        for name in ("tail_perm", "head_perm", "pair_perm"):
            assert int(getattr(fact_index, name).max()) < fact_index.num_facts
        assert not fact_index.tail_count[before.num_facts :].any()
        assert not fact_index.head_count[before.num_facts :].any()
        key = fact_index.pair_graph.long() * capacity.relations + fact_index.pair_relation
        assert (key.diff() >= 0).all() and int(fact_index.pair_relation.max()) < capacity.relations
        # No pair of the padding shares a relation with a real one.
        added = fact_index.pair_relation[before.num_pairs :]
        assert int(added.min()) >= batch.relation_row.shape[0]
    for rows in (graph.topic_prob, graph.node_count):
        assert not rows[plain.num_nodes :].any()
    assert not graph.label[plain.num_facts :].any()
    topics = plain.topic_node.shape[0]
    assert (graph.topic_node[topics:] == capacity.nodes - 1).all()
    assert (graph.topic_graph[topics:] == capacity.graphs - 1).all()
    for owner in (graph.node_graph, graph.fact_graph):
        assert (owner.diff() >= 0).all() and int(owner.max()) == capacity.graphs - 1
    tokens = padded.relation_tokens
    length = tokens.ptr.diff()
    assert int(tokens.ptr[-1]) == tokens.ids.shape[0] == capacity.relation_tokens
    assert (length >= 0).all() and length[2 * batch.relation_row.shape[0] :].max() <= WORDS
    mine, given = {t.data_ptr() for t in padded.tensors()}, {t.data_ptr() for t in batch.tensors()}
    assert not mine & given


def test_batches_fall_into_a_few_buckets(collate):
    draw = random.Random(2)
    batches = [collate(draw.sample(range(QUESTIONS), 12)) for _ in range(30)]
    buckets = Buckets(batches[:4])
    capacities = [buckets.capacity(batch) for batch in batches]
    assert len(set(capacities)) <= 6
    for batch, capacity in zip(batches, capacities, strict=True):
        assert capacity.holds(required_capacity(batch))
        smaller = Capacity(*(int(size / BUCKET_GROWTH) - 1 for size in capacity))
        assert not smaller.holds(required_capacity(batch))
    # Exactly at a bucket, and one more.
    level = buckets.at_level(2)
    full = pad_batch(batches[0], Capacity(*(size - 1 for size in level)))
    assert required_capacity(full) == buckets.capacity(full) == level
    assert buckets.capacity(pad_batch(batches[0], level)) == buckets.at_level(3)
    # A bucket depends on the samples and the batch alone.
    assert [Buckets(batches[:4]).capacity(b) for b in reversed(batches)] == capacities[::-1]
    small = collate([EMPTY])
    assert buckets.capacity(small).holds(required_capacity(small))


def test_what_cannot_be_padded_is_refused(collate):
    batch = collate([STAR, 7])
    need = required_capacity(batch)
    for place, field in enumerate(Capacity._fields):
        small = need._replace(**{field: need[place] - 1})
        with pytest.raises(ValueError, match="does not hold"):
            pad_batch(batch, small)
    kept = {f.name: getattr(batch, f.name) for f in fields(batch)}
    with pytest.raises(ValueError, match="prompts"):
        pad_batch(QuestionBatch(**kept | {"prefix": batch.relation_tokens}), need)
    with pytest.raises(ValueError, match="at least one"):
        Buckets([])


def test_padded_packs_of_all_capacities_share_a_graph(collate, relations, compile_with):
    model = retriever(num_instructions=1)
    counter = CompileCounter()
    compiled = compile_with(model, counter)
    for batch in list(batches_of(collate).values())[::3]:
        need = required_capacity(batch)
        for capacity in (need, roomy(need)):
            padded = pad_batch(batch, capacity)
            torch.testing.assert_close(
                compiled(padded, relations).fact_logits, model(padded, relations).fact_logits
            )
    # Padding leaves no size of one or zero, which a compiler would set apart.
    assert 1 <= counter.frame_count <= 2
