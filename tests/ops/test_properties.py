"""Properties of the ops on random packs: fact order, packing and zero gradients.

The kernels are tested too, with TRITON_INTERPRET=1 or on a CUDA device.
"""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dragkit_kernels import (
    FactIndex,
    fact_scores,
    gumbel_topk,
    message_passing,
    relation_sum,
    segment_softmax,
)
from dragkit_kernels.backend import INTERPRETED
from dragkit_kernels.testing import (
    Adjacency,
    adjacency,
    assert_close,
    gradients,
    leaves,
    random_adjacency,
)

WIDTH, RELATIONS = 5, 4

few = settings(
    max_examples=4 if INTERPRETED else 15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
graphs = st.lists(
    st.tuples(st.integers(1, 6), st.integers(0, 14)), min_size=1, max_size=4
) | st.just([(3, 90), (0, 0), (2, 5)])
seeds = st.integers(0, 2**16)


def to_backend(backend: str, *tensors: Tensor) -> list[Tensor]:
    """The tensors on the device of the backend."""
    on_gpu = backend == "triton" and not INTERPRETED
    return [x.cuda() if on_gpu else x for x in tensors]


class Pack:
    """A pack with the inputs of all ops."""

    def __init__(self, adjacency: Adjacency, values: dict[str, Tensor], backend: str) -> None:
        fact_index, self.node_graph, self.node_ptr, _, self.fact_ptr, _, self.node_count = adjacency
        self.backend = backend
        self.fact_index = FactIndex(*to_backend(backend, *fact_index))
        self.node_graph, self.node_ptr, self.fact_ptr, self.node_count = to_backend(
            backend, self.node_graph, self.node_ptr, self.fact_ptr, self.node_count
        )
        self.values = dict(zip(values, to_backend(backend, *values.values()), strict=True))
        self.inputs = leaves(list(self.values.values()))

    def outputs(self) -> dict[str, Tensor]:
        h, p, fwd, inv, self_table, weight, bias, table, pair_score, logits, noise = self.inputs
        options = {"fact_index": self.fact_index, "backend": self.backend}
        drawn = gumbel_topk(
            logits, self.fact_ptr, 3, noise=noise, max_facts=90, backend=self.backend
        )
        return {
            "layer": message_passing(
                h, p, fwd, inv, self_table, weight, bias, node_graph=self.node_graph, **options
            ),
            "relation_sum": relation_sum(table, **options),
            "softmax": segment_softmax(
                h.sum(1), self.node_ptr, count=self.node_count, backend=self.backend
            ),
            "scores": fact_scores(h.sum(1), pair_score, p, bias[0], **options),
            "soft": drawn.soft,
            "gate": drawn.gate,
        }


def random_values(pack: Adjacency, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    nodes, pairs, facts = (
        pack.fact_index.num_nodes,
        pack.fact_index.num_pairs,
        pack.fact_index.num_facts,
    )
    shapes = {
        "h": (nodes, WIDTH),
        "p": (nodes,),
        "fwd": (pairs, WIDTH),
        "inv": (pairs, WIDTH),
        "self_table": (len(pack.node_ptr) - 1, WIDTH),
        "weight": (WIDTH, WIDTH),
        "bias": (WIDTH,),
        "table": (pairs, WIDTH),
        "pair_score": (pairs,),
        "logits": (facts,),
        "noise": (facts,),
    }
    return {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}


def rebuilt(pack: Adjacency, order: Tensor, sizes: list[tuple[int, int]]) -> Adjacency:
    """The pack with its facts in another order."""
    facts = pack.fact_index
    return adjacency(
        sizes,
        facts.head.long()[order],
        facts.tail.long()[order],
        pack.relation[order],
        head_count=facts.head_count[order],
        tail_count=facts.tail_count[order],
        node_count=pack.node_count,
    )


@few
@given(sizes=graphs, seed=seeds)
def test_the_order_of_the_facts_does_not_matter(
    backend: str, sizes: list[tuple[int, int]], seed: int
) -> None:
    pack = random_adjacency(sizes, RELATIONS, seed=seed)
    values = random_values(pack, seed)
    generator = torch.Generator().manual_seed(seed)
    permutations = [
        int(first) + torch.randperm(size, generator=generator)
        for first, (_, size) in zip(pack.fact_ptr, sizes, strict=False)
    ]
    order = torch.cat(permutations)
    moved = rebuilt(pack, order, sizes)
    shuffled = values | {name: values[name][order] for name in ("logits", "noise")}
    want = Pack(pack, values, backend).outputs()
    got = Pack(moved, shuffled, backend).outputs()
    (order,) = to_backend(backend, order)
    for name in ("scores", "soft"):
        want[name] = want[name][order]
    for name in want:
        if name != "gate":
            assert_close(got[name], want[name].double(), name=name, tolerance=2e-6)
    assert torch.equal(got["gate"].sum(1), want["gate"].sum(1))


@few
@given(sizes=graphs, seed=seeds)
def test_a_question_does_not_depend_on_the_others(
    backend: str, sizes: list[tuple[int, int]], seed: int
) -> None:
    """A graph alone has the outputs and gradients that it has in the pack."""
    pack = random_adjacency(sizes, RELATIONS, seed=seed)
    values = random_values(pack, seed)
    joined = Pack(pack, values, backend)
    want = joined.outputs()
    common = {"weight": slice(None), "bias": slice(None)}
    facts_of, nodes_of = pack.fact_ptr.tolist(), pack.node_ptr.tolist()
    pair_of = torch.searchsorted(pack.fact_index.pair_graph, torch.arange(len(sizes) + 1)).tolist()
    for g, size in enumerate(sizes):
        node = slice(nodes_of[g], nodes_of[g + 1])
        fact = slice(facts_of[g], facts_of[g + 1])
        pair = slice(pair_of[g], pair_of[g + 1])
        rows = {"h": node, "p": node, "self_table": slice(g, g + 1), "logits": fact, "noise": fact}
        rows |= common | dict.fromkeys(("fwd", "inv", "table", "pair_score"), pair)
        facts = pack.fact_index
        alone = adjacency(
            [size],
            facts.head[fact].long() - nodes_of[g],
            facts.tail[fact].long() - nodes_of[g],
            pack.relation[fact],
            head_count=facts.head_count[fact],
            tail_count=facts.tail_count[fact],
            node_count=pack.node_count[node],
        )
        single = Pack(alone, {n: x[rows[n]] for n, x in values.items()}, backend)
        got = single.outputs()
        rows_of_output = dict.fromkeys(("layer", "relation_sum", "softmax"), node)
        rows_of_output |= dict.fromkeys(("scores", "soft"), fact) | {"gate": slice(g, g + 1)}
        for name, x in got.items():
            assert_close(x, want[name][rows_of_output[name]].double(), name=name, tolerance=2e-6)
        loss = sum(x.square().sum() for x in got.values())
        in_pack = sum(want[name][rows_of_output[name]].square().sum() for name in got)
        grads = gradients(loss, single.inputs, torch.ones(()))
        wanted = torch.autograd.grad(
            in_pack, joined.inputs, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for name, x, y in zip(values, grads, wanted, strict=True):
            assert_close(x, y[rows[name]].double(), name=f"d{name}")


@few
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=5), k=st.integers(0, 200), seed=seeds
)
def test_exact_k_selects_min_of_k_and_the_facts(
    backend: str, sizes: list[int], k: int, seed: int
) -> None:
    ptr = torch.tensor([0, *sizes]).cumsum(0).int()
    generator = torch.Generator().manual_seed(seed)
    # Five different values, so most facts are tied with others.
    logits = torch.randint(-2, 3, (sum(sizes),), generator=generator).float()
    logits, noise, ptr = to_backend(backend, logits, torch.zeros(sum(sizes)), ptr)
    drawn = gumbel_topk(logits, ptr, k, noise=noise, mode="exact_k", max_facts=20, backend=backend)
    assert drawn.count.tolist() == [min(k, size) for size in sizes]
    for g, (first, size) in enumerate(zip(ptr.tolist(), sizes, strict=False)):
        graph_logits = logits[first : first + size]
        best = torch.argsort(graph_logits, descending=True, stable=True)[:k] + first
        assert drawn.index[g, : min(k, size)].tolist() == best.tolist()
        assert bool((drawn.index[g, min(k, size) :] == -1).all())
