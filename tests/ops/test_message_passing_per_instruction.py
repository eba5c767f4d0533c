"""The published sums against a loop over facts, and the collapsed layer against them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dragkit_kernels import message_passing, message_passing_per_instruction
from dragkit_kernels.testing import (
    Adjacency,
    assert_close,
    gradients,
    leaves,
    padded_facts,
    random_adjacency,
    strided_like,
)

WIDTH = 7


def make_inputs(pack: Adjacency, instructions: int = 2, width: int = 5) -> list[Tensor]:
    relations = int(pack.relation.max()) + 1 if pack.relation.numel() else 1
    graphs = len(pack.node_ptr) - 1
    shapes = [
        (pack.fact_index.num_nodes,),
        (relations, width),
        (relations, width),
        (width,),
        (width,),
        (graphs, instructions, width),
    ]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def by_loop(pack: Adjacency, inputs: list[Tensor]) -> Tensor:
    """The published sums: relu of the product of relation and instruction, fact by fact."""
    p, rel_fwd, rel_inv, self_fwd, self_inv, instruction = inputs
    fact_index, graph_of = pack.fact_index, pack.node_graph.tolist()
    out = []
    for k in range(instruction.shape[1]):
        fwd = [p[v] * torch.relu(self_fwd * instruction[g, k]) for v, g in enumerate(graph_of)]
        inv = [p[v] * torch.relu(self_inv * instruction[g, k]) for v, g in enumerate(graph_of)]
        for e, relation in enumerate(pack.relation.tolist()):
            head, tail = int(fact_index.head[e]), int(fact_index.tail[e])
            i = instruction[graph_of[head], k]
            tail_count, head_count = int(fact_index.tail_count[e]), int(fact_index.head_count[e])
            fwd[tail] = fwd[tail] + tail_count * p[head] * torch.relu(rel_fwd[relation] * i)
            inv[head] = inv[head] + head_count * p[tail] * torch.relu(rel_inv[relation] * i)
        out += [torch.stack(fwd), torch.stack(inv)]
    return torch.stack(out, dim=1)


def per_instruction(pack: Adjacency, inputs: list[Tensor]) -> Tensor:
    return message_passing_per_instruction(
        *inputs, fact_index=pack.fact_index, node_graph=pack.node_graph
    )


@pytest.mark.parametrize("padding", [0, 40])
def test_matches_the_loop_with_every_gradient(pack: Adjacency, padding: int) -> None:
    """With padding, facts after the last offset belong to no node."""
    values = [strided_like(x) for x in make_inputs(pack)]
    exact, tried = leaves(values), leaves(values)
    expected = by_loop(pack, exact)
    actual = per_instruction(padded_facts(pack, padding) if padding else pack, tried)
    assert_close(actual, expected)
    for grad in (torch.ones(()).expand(expected.shape), torch.randn_like(expected)):
        wanted = gradients(expected, exact, grad, retain_graph=True)
        got = gradients(actual, tried, grad, retain_graph=True)
        for argument, (x, y) in enumerate(zip(got, wanted, strict=True)):
            assert_close(x, y, name=str(argument))


def test_the_collapsed_layer_equals_the_published_one() -> None:
    """relu(V [h ; o_1 ; ...] + c) from the published sums, and from one table row per pair."""
    pack = random_adjacency([(9, 20), (4, 7)], 4)
    p, rel_fwd, rel_inv, self_fwd, self_inv, instruction = make_inputs(pack, 3, WIDTH)
    h = torch.randn(13, WIDTH, dtype=torch.float64)
    matrix = torch.randn(WIDTH, 7 * WIDTH, dtype=torch.float64)
    bias = torch.randn(WIDTH, dtype=torch.float64)
    sums = message_passing_per_instruction(
        p,
        rel_fwd,
        rel_inv,
        self_fwd,
        self_inv,
        instruction,
        fact_index=pack.fact_index,
        node_graph=pack.node_graph,
    )
    expected = torch.relu(torch.cat([h, sums.flatten(1)], 1) @ matrix.t() + bias)
    blocks = matrix[:, WIDTH:].view(WIDTH, 3, 2, WIDTH)

    def rows(u: Tensor, graphs: Tensor, direction: int) -> Tensor:
        c = torch.relu(u.unsqueeze(-2) * instruction[graphs])
        return torch.einsum("rkc,okc->ro", c, blocks[:, :, direction])

    pair_graph, pair_relation = (
        pack.fact_index.pair_graph.long(),
        pack.fact_index.pair_relation.long(),
    )
    graphs = torch.arange(2)
    actual = message_passing(
        h,
        p,
        rows(rel_fwd[pair_relation], pair_graph, 0),
        rows(rel_inv[pair_relation], pair_graph, 1),
        rows(self_fwd.expand(2, -1), graphs, 0) + rows(self_inv.expand(2, -1), graphs, 1),
        matrix[:, :WIDTH].t(),
        bias,
        fact_index=pack.fact_index,
        node_graph=pack.node_graph,
    )
    assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    pack = random_adjacency([(9, 20), (0, 0), (13, 60)], 4)
    values = [x.to(dtype) for x in make_inputs(pack, 3)]
    exact, tried = leaves([x.double() for x in values]), leaves(values)
    actual, expected = per_instruction(pack, tried), by_loop(pack, exact)
    assert actual.dtype == torch.float32
    assert_close(actual, expected, tolerance=2e-6)
    grad = torch.randn_like(actual)
    wanted = gradients(expected, exact, grad)
    for got, want in zip(gradients(actual, tried, grad), wanted, strict=True):
        assert got.dtype == dtype
        assert_close(got, want)


def test_wrong_arguments() -> None:
    pack = random_adjacency([(9, 20), (4, 7)], 4)
    inputs = make_inputs(pack)
    for argument, bad, message in (
        (1, inputs[1][:-1], r"rel_inv must have shape \[3, 5\], got \[4, 5\]"),
        (5, inputs[5][0], r"instruction must have shape \[\*, \*, \*\], got \[2, 5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            per_instruction(pack, [*inputs[:argument], bad, *inputs[argument + 1 :]])
