"""The un-collapsed sums against a loop, and the collapsed layer against them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dragkit_kernels import message_passing, message_passing_parity, message_passing_parity_ref
from dragkit_kernels.message_passing import _parity_walks
from dragkit_kernels.noise import dropout_scale, dropped, philox4x32
from dragkit_kernels.testing import (
    Adjacency,
    assert_close,
    gradients,
    leaves,
    random_adjacency,
    strided_like,
)

WIDTH = 7


def parity_inputs(pack: Adjacency, instructions: int = 2, width: int = 5) -> list[Tensor]:
    relations = int(pack.relation.max()) + 1 if pack.relation.numel() else 1
    graphs = len(pack.node_ptr) - 1
    shapes = [
        (pack.orders.num_nodes,),
        (relations, width),
        (relations, width),
        (width,),
        (width,),
        (graphs, instructions, width),
    ]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def loop_parity(pack: Adjacency, inputs: list[Tensor]) -> Tensor:
    """The published sums: relu of the product of relation and instruction, fact by fact."""
    p, rel_fwd, rel_inv, self_fwd, self_inv, instruction = inputs
    orders, graph_of = pack.orders, pack.node_graph.tolist()
    out = []
    for k in range(instruction.shape[1]):
        fwd = [p[v] * torch.relu(self_fwd * instruction[g, k]) for v, g in enumerate(graph_of)]
        inv = [p[v] * torch.relu(self_inv * instruction[g, k]) for v, g in enumerate(graph_of)]
        for e, relation in enumerate(pack.relation.tolist()):
            head, tail = int(orders.head[e]), int(orders.tail[e])
            i = instruction[graph_of[head], k]
            into, out_of = int(orders.tail_count[e]), int(orders.head_count[e])
            fwd[tail] = fwd[tail] + into * p[head] * torch.relu(rel_fwd[relation] * i)
            inv[head] = inv[head] + out_of * p[tail] * torch.relu(rel_inv[relation] * i)
        out += [torch.stack(fwd), torch.stack(inv)]
    return torch.stack(out, dim=1)


def test_parity_matches_the_loop_with_every_gradient(pack: Adjacency) -> None:
    values = parity_inputs(pack)
    exact, tried = leaves(values), leaves(values)
    expected = loop_parity(pack, exact)
    actual = message_passing_parity(*tried, orders=pack.orders, node_graph=pack.node_graph)
    assert_close(actual, expected)
    grad = torch.randn_like(expected)
    wanted = gradients(expected, exact, grad)
    for place, got in enumerate(gradients(actual, tried, grad)):
        assert_close(got, wanted[place], name=str(place))


def test_collapsed_layer_equals_the_parity_form() -> None:
    """relu(V [h ; o_1 ; ...] + c) both ways: with the sums, and with rows made per pair."""
    pack = random_adjacency([(9, 20), (4, 7)], 4)
    p, rel_fwd, rel_inv, self_fwd, self_inv, instruction = parity_inputs(pack, 3, WIDTH)
    h = torch.randn(13, WIDTH, dtype=torch.float64)
    matrix = torch.randn(WIDTH, 7 * WIDTH, dtype=torch.float64)
    bias = torch.randn(WIDTH, dtype=torch.float64)
    sums = message_passing_parity(
        p,
        rel_fwd,
        rel_inv,
        self_fwd,
        self_inv,
        instruction,
        orders=pack.orders,
        node_graph=pack.node_graph,
    )
    expected = torch.relu(torch.cat([h, sums.flatten(1)], 1) @ matrix.t() + bias)
    blocks = matrix[:, WIDTH:].view(WIDTH, 3, 2, WIDTH)

    def rows(u: Tensor, graphs: Tensor, direction: int) -> Tensor:
        c = torch.relu(u.unsqueeze(-2) * instruction[graphs])
        return torch.einsum("rkc,okc->ro", c, blocks[:, :, direction])

    pair_graph, pair_relation = pack.orders.pair_graph.long(), pack.orders.pair_relation.long()
    every = torch.arange(2)
    actual = message_passing(
        h,
        p,
        rows(rel_fwd[pair_relation], pair_graph, 0),
        rows(rel_inv[pair_relation], pair_graph, 1),
        rows(self_fwd.expand(2, -1), every, 0) + rows(self_inv.expand(2, -1), every, 1),
        matrix[:, :WIDTH].t(),
        bias,
        orders=pack.orders,
        node_graph=pack.node_graph,
    )
    assert_close(actual, expected)


def test_low_precision_is_summed_in_float32() -> None:
    pack = random_adjacency([(9, 20), (4, 7)], 4)
    inputs = [x.bfloat16() for x in parity_inputs(pack)]
    out = message_passing_parity(*inputs, orders=pack.orders, node_graph=pack.node_graph)
    assert out.dtype == torch.float32
    assert_close(out, loop_parity(pack, [x.double() for x in inputs]))


def parity(pack: Adjacency, inputs: list[Tensor], dropout: float = 0.0, seed: int = 3) -> Tensor:
    return message_passing_parity(
        *inputs,
        orders=pack.orders,
        node_graph=pack.node_graph,
        dropout=dropout,
        seed=torch.tensor(seed),
    )


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_op_and_reference_agree(pack: Adjacency, dropout: float) -> None:
    """The gradients written out equal those of autograd, dropped places included."""
    values = [strided_like(x) for x in parity_inputs(pack, 5)]
    tried, exact = leaves(values), leaves(values)
    settings = {"dropout": dropout, "seed": torch.tensor(3)}
    expected = message_passing_parity_ref(
        *exact, orders=pack.orders, node_graph=pack.node_graph, **settings
    )
    actual = parity(pack, tried, dropout)
    assert_close(actual, expected)
    one = torch.ones((), dtype=torch.float64).expand(expected.shape)
    for grad in (one, torch.randn_like(expected)):
        wanted = torch.autograd.grad(expected, exact, grad, retain_graph=True)
        got = torch.autograd.grad(actual, tried, grad, retain_graph=True)
        for place, (g, want) in enumerate(zip(got, wanted, strict=True)):
            assert_close(g, want, name=str(place))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradcheck(dropout: float) -> None:
    pack = random_adjacency([(3, 5), (0, 0), (2, 3)], 3)
    inputs = leaves(parity_inputs(pack, 2, 3))
    assert torch.autograd.gradcheck(lambda *x: parity(pack, list(x), dropout), inputs)


@pytest.mark.parametrize(
    ("dtype", "forward", "gradient"),
    [
        (torch.float32, 2e-6, 1e-5),
        (torch.float16, 1e-3, 2e-3),
        (torch.bfloat16, 4e-3, 8e-3),
    ],
)
@pytest.mark.parametrize("width", [1, 7, 64, 96, 257])
def test_dtypes_and_widths(dtype: torch.dtype, forward: float, gradient: float, width: int) -> None:
    pack = random_adjacency([(9, 20), (0, 0), (13, 60)], 4)
    values = [x.to(dtype) for x in parity_inputs(pack, 3, width)]
    exact, tried = leaves([x.double() for x in values]), leaves(values)
    actual, expected = parity(pack, tried), loop_parity(pack, exact)
    assert actual.dtype == torch.float32
    assert_close(actual, expected, tolerance=forward)
    grad = torch.randn_like(actual)
    wanted = gradients(expected, exact, grad)
    for x, g, want in zip(tried, gradients(actual, tried, grad), wanted, strict=True):
        assert g.dtype == x.dtype
        assert_close(g, want, tolerance=gradient)


def test_dropped_elements_are_those_of_the_generator() -> None:
    """Counter (column, k // 4, row, 0), word k % 4, one half of it for each direction."""
    seed, dropout = torch.tensor(-(1 << 40) - 17), 0.3
    drop = dropped(seed, 3, 6, 5, dropout)
    assert drop.shape == (3, 6, 2, 5)
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    for row, k, column in ((0, 0, 0), (2, 1, 4), (1, 3, 2), (2, 5, 3)):
        counter = tuple(torch.tensor(n) for n in (column, k // 4, row, 0))
        word = int(philox4x32(counter, key)[k % 4])
        for direction, half in enumerate((word & 0xFFFF, word >> 16)):
            assert bool(drop[row, k, direction, column]) == (half < round(dropout * 65536))


def test_dropped_elements_depend_on_their_place_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = torch.tensor(11)
    every = dropped(seed, 40, 9, 12, 0.5)
    assert torch.equal(dropped(seed, 7, 5, 8, 0.5), every[:7, :5, :, :8])
    assert not torch.equal(dropped(torch.tensor(12), 40, 9, 12, 0.5), every)
    assert not torch.equal(dropped(torch.tensor(11 + (1 << 32)), 40, 9, 12, 0.5), every)
    monkeypatch.setattr("dragkit_kernels.noise._CHUNK", 100)
    assert torch.equal(dropped(seed, 40, 9, 12, 0.5), every)


@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.8])
def test_dropout_drops_as_often_as_it_says(dropout: float) -> None:
    """In all, and for every instruction and direction, within four standard deviations."""
    drop = dropped(torch.tensor(5), 500, 6, 64, dropout).double()
    spread = math.sqrt(dropout * (1 - dropout))
    assert abs(float(drop.mean()) - dropout) < 4 * spread / math.sqrt(drop.numel())
    slots = drop.mean((0, 3)) - dropout
    assert float(slots.abs().max()) < 4 * spread / math.sqrt(500 * 64)
    # Nor do two slots, or the same slot of neighbouring columns or nodes, go together.
    flat = drop.permute(1, 2, 0, 3).flatten(0, 1)
    correlation = torch.corrcoef(flat.flatten(1)) - torch.eye(12, dtype=torch.float64)
    assert float(correlation.abs().max()) < 4 / math.sqrt(500 * 64)
    centred = flat - flat.mean()
    for a, b in ((centred[..., 1:], centred[..., :-1]), (centred[:, 1:], centred[:, :-1])):
        assert abs(float((a * b).mean()) / spread**2) < 4 / math.sqrt(a.numel())
    assert dropout_scale(dropout) == pytest.approx(1 / (1 - dropout), rel=1e-4)


def test_the_backward_drops_what_the_forward_dropped() -> None:
    pack = random_adjacency([(9, 20), (4, 7)], 4)
    values = [x.abs() + 0.1 for x in parity_inputs(pack, 5)]
    tried = leaves(values)
    out, plain = parity(pack, tried, 0.3), parity(pack, values)
    drop = dropped(torch.tensor(3), 13, 5, 5, 0.3).flatten(1, 2)
    assert torch.equal(out == 0, drop)
    assert_close(out[~drop], plain[~drop] * dropout_scale(0.3))
    for grad, reaches in ((drop.double(), False), ((~drop).double(), True)):
        got = torch.autograd.grad(out, tried, grad, retain_graph=True)
        assert all(bool(g.any()) == reaches for g in got)
    assert not any(g.any() for g in gradients(out, tried, torch.zeros_like(out)))
    assert torch.equal(out, parity(pack, values, 0.3))
    assert not torch.equal(out, parity(pack, values, 0.3, seed=4))


def test_infinite_and_missing_numbers_are_dropped_with_their_place() -> None:
    pack = random_adjacency([(9, 20), (4, 7)], 4)
    values = parity_inputs(pack)
    values[0][3] = float("inf")
    values[5][1, 0, 2] = float("nan")
    settings = {"orders": pack.orders, "node_graph": pack.node_graph, "seed": torch.tensor(3)}
    out = parity(pack, values, 0.4)
    wanted = message_passing_parity_ref(*values, dropout=0.4, **settings)
    assert torch.equal(out.isnan(), wanted.isnan()) and bool(out.isnan().any())
    assert torch.equal(out.isinf(), wanted.isinf())
    drop = dropped(torch.tensor(3), 13, 2, 5, 0.4).flatten(1, 2)
    assert not out[drop].any()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_opcheck(dropout: float) -> None:
    pack = random_adjacency([(5, 9), (0, 0), (4, 6)], 4)
    plain = [x.float() for x in parity_inputs(pack)]
    seed = torch.tensor(3) if dropout else None
    rest = (*_parity_walks(pack.orders), pack.node_graph, seed, dropout)
    op = torch.ops.dragkit.message_passing_parity_fwd.default
    torch.library.opcheck(op, (*leaves(plain), *rest, False))
    low = [x.bfloat16() for x in plain]
    torch.library.opcheck(op, (*low, *rest, False), test_utils=("test_schema", "test_faketensor"))
    grad = torch.randn(9, 4, 5)
    for mask in ([True] * 6, [False, True, False, True, False, True], [False] * 5 + [True]):
        torch.library.opcheck(
            torch.ops.dragkit.message_passing_parity_bwd.default, (grad, *plain, *rest, mask, False)
        )


def test_unwanted_gradients_are_not_computed() -> None:
    pack = random_adjacency([(5, 9), (4, 6)], 4)
    plain = parity_inputs(pack)
    rest = (*_parity_walks(pack.orders), pack.node_graph, None, 0.0)
    grad = torch.ones(9, 4, 5, dtype=torch.float64)
    op = torch.ops.dragkit.message_passing_parity_bwd
    every = op(grad, *plain, *rest, [True] * 6, False)
    for place in range(6):
        mask = [place == other for other in range(6)]
        alone = op(grad, *plain, *rest, mask, False)
        assert [g.numel() > 0 for g in alone] == mask
        assert torch.equal(alone[place], every[place])


def test_second_derivatives_are_refused() -> None:
    pack = random_adjacency([(5, 9), (4, 6)], 4)
    inputs = leaves(parity_inputs(pack))
    grads = torch.autograd.grad((parity(pack, inputs) ** 2).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="message_passing_parity_bwd has no derivative"):
        sum(g.sum() for g in grads).backward()


def test_compiled_equals_eager_for_any_size() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(parity, fullgraph=True, backend="aot_eager", dynamic=True)
    for sizes in ([(6, 9), (13, 20)], [(4, 7), (0, 0), (9, 30)]):
        pack = random_adjacency(sizes, 6)
        inputs = leaves(parity_inputs(pack, 3))
        for dropout in (0.0, 0.3):
            results = []
            for function in (parity, compiled):
                out = function(pack, inputs, dropout)
                results.append([out, *gradients(out, inputs, torch.ones_like(out))])
            for want, got in zip(*results, strict=True):
                assert_close(got, want)


def test_wrong_dropout() -> None:
    pack = random_adjacency([(9, 20), (4, 7)], 4)
    inputs = parity_inputs(pack)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1.0"):
        parity(pack, inputs, 1.0)
    settings = {"orders": pack.orders, "node_graph": pack.node_graph, "dropout": 0.5}
    with pytest.raises(ValueError, match=r"needs a seed of shape \[\], got None"):
        message_passing_parity(*inputs, **settings)
    with pytest.raises(ValueError, match=r"seed must have shape \[\], got \[1\]"):
        message_passing_parity(*inputs, **settings, seed=torch.tensor([1]))
    with pytest.raises(ValueError, match="seed must be int64, got torch.int32"):
        message_passing_parity(*inputs, **settings, seed=torch.tensor(1).int())


def test_wrong_instruction() -> None:
    pack = random_adjacency([(9, 20), (4, 7)], 4)
    inputs = parity_inputs(pack)
    inputs[5] = inputs[5][0]
    with pytest.raises(
        ValueError, match=r"instruction must have shape \[\*, \*, \*\], got \[2, 5\]"
    ):
        message_passing_parity(*inputs, orders=pack.orders, node_graph=pack.node_graph)
