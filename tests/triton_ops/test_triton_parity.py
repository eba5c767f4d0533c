"""The kernels of message_passing_parity against its reference, with dropout and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dragkit_kernels import message_passing_parity, message_passing_parity_ref
from dragkit_kernels.message_passing import _parity_walks, parity_backward
from dragkit_kernels.noise import dropped
from dragkit_kernels.testing import (
    Adjacency,
    adjacency,
    assert_close,
    fenced_allocations,
    gradients,
    leaves,
    random_adjacency,
    strided_like,
)
from tests.triton_ops.cases import GRADIENT, to_device

NAMES = ("p", "rel_fwd", "rel_inv", "self_fwd", "self_inv", "instruction")
SEED = (1 << 40) + 17
# Every result is float32; a gradient has the dtype of its input.
FORWARD = 2e-6


def _star() -> Adjacency:
    """Node 0 is the tail of 75 facts of one relation and the head of none; node 16 is alone."""
    head = 1 + torch.arange(75) % 15
    return adjacency([(17, 75)], head, torch.zeros_like(head), torch.zeros_like(head))


PACKS: dict[str, Callable[[], Adjacency]] = {
    "empty_first_middle_last": lambda: random_adjacency(
        [(0, 0), (5, 12), (1, 3), (0, 0), (17, 31), (8, 0), (0, 0)], 4
    ),
    "many_graphs": lambda: random_adjacency([(3, 4)] * 7, 3),
    # Nodes and pairs of more facts than are walked one by one.
    "hubs": lambda: random_adjacency([(5, 170), (3, 0)], 2),
    "star": _star,
    "no_facts": lambda: random_adjacency([(3, 0), (2, 0)], 1),
    "no_nodes": lambda: random_adjacency([(0, 0), (0, 0)], 1),
}


@pytest.fixture(params=PACKS, ids=list(PACKS))
def pack(request: pytest.FixtureRequest, device: torch.device) -> Adjacency:
    return to_device(PACKS[request.param](), device)


@pytest.fixture
def small(device: torch.device) -> Adjacency:
    return to_device(random_adjacency([(9, 20), (0, 0), (4, 7)], 4), device)


@pytest.fixture
def tiny(device: torch.device) -> Adjacency:
    return to_device(random_adjacency([(4, 8), (0, 0), (2, 3)], 2), device)


def make_inputs(
    pack: Adjacency, dtype: torch.dtype, width: int, instructions: int = 3
) -> list[Tensor]:
    relations = int(pack.relation.max()) + 2 if pack.relation.numel() else 1
    graphs = len(pack.node_ptr) - 1
    shapes = [
        *((pack.orders.num_nodes,), (relations, width), (relations, width), (width,), (width,)),
        (graphs, instructions, width),
    ]
    generator = torch.Generator().manual_seed(width)
    device = pack.node_graph.device
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def settings(pack: Adjacency, dropout: float) -> dict[str, object]:
    seed = torch.tensor(SEED, device=pack.node_graph.device) if dropout else None
    return {
        "orders": pack.orders,
        "node_graph": pack.node_graph,
        "dropout": dropout,
        "seed": seed,
    }


def check(
    pack: Adjacency, values: list[Tensor], dropout: float = 0.0, grad: Tensor | None = None
) -> None:
    """Result and gradients of kernels and float64 reference agree; every buffer is filled."""
    exact, tried = leaves([x.double() for x in values]), leaves(values)
    expected = message_passing_parity_ref(*exact, **settings(pack, dropout))
    if grad is None:
        grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
        grad = grad.to(expected.device)
    with fenced_allocations():
        actual = message_passing_parity(*tried, **settings(pack, dropout), backend="triton")
        got = gradients(actual, tried, grad)
    assert actual.dtype == torch.float32
    assert_close(actual, expected, name="out", tolerance=FORWARD)
    for name, x, g, want in zip(NAMES, values, got, gradients(expected, exact, grad), strict=True):
        assert g.dtype == x.dtype
        assert_close(g, want, name=f"d{name}", tolerance=GRADIENT[g.dtype])


def test_result_and_every_gradient(pack: Adjacency) -> None:
    check(pack, make_inputs(pack, torch.float32, 7), 0.4)


def test_without_dropout(device: torch.device) -> None:
    pack = to_device(PACKS["empty_first_middle_last"](), device)
    check(pack, make_inputs(pack, torch.float32, 7))


@pytest.mark.parametrize("width", [1, 64, 96, 257])
def test_widths(tiny: Adjacency, width: int) -> None:
    check(tiny, make_inputs(tiny, torch.float32, width, 2), 0.3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 64])
def test_low_precision(tiny: Adjacency, dtype: torch.dtype, width: int) -> None:
    check(tiny, make_inputs(tiny, dtype, width, 2), 0.3)


@pytest.mark.parametrize("instructions", [1, 4, 5, 9])
def test_more_instructions_than_words_of_a_counter(tiny: Adjacency, instructions: int) -> None:
    check(tiny, make_inputs(tiny, torch.float32, 6, instructions), 0.5)


@pytest.mark.parametrize("places", [(0,), (1, 3), (2, 4, 5)])
def test_mixed_precision(tiny: Adjacency, places: tuple[int, ...]) -> None:
    values = make_inputs(tiny, torch.float32, 16)
    for place in places:
        values[place] = values[place].bfloat16()
    check(tiny, values)


def test_strides(small: Adjacency) -> None:
    values = [strided_like(x) for x in make_inputs(small, torch.float32, 20)]
    one = torch.ones((), device=values[0].device).expand(13, 6, 20)
    check(small, values, 0.3, one)
    columns = torch.randn(20, 6, 13, device=values[0].device).permute(2, 1, 0)
    check(small, values, 0.3, columns)


def test_zeros_have_no_slope(small: Adjacency) -> None:
    values = make_inputs(small, torch.float32, 12)
    for x in values[1:]:
        x[..., ::3] = 0
    check(small, values)


def test_no_instructions(small: Adjacency) -> None:
    values = leaves(make_inputs(small, torch.float32, 5, 0))
    out = message_passing_parity(*values, **settings(small, 0.2), backend="triton")
    assert out.shape == (13, 0, 5)
    grads = torch.autograd.grad(out.sum(), values)
    assert not any(g.any() for g in grads)


def test_each_gradient_alone(tiny: Adjacency) -> None:
    values = make_inputs(tiny, torch.float32, 20, 1)
    every = leaves(values)
    out = message_passing_parity(*every, **settings(tiny, 0.3), backend="triton")
    one = torch.ones_like(out)
    together = gradients(out, every, one)
    for place, want in enumerate(together):
        alone = [x.detach() for x in values]
        alone[place].requires_grad_()
        with fenced_allocations():
            out = message_passing_parity(*alone, **settings(tiny, 0.3), backend="triton")
            (got,) = gradients(out, [alone[place]], one)
        assert torch.equal(got, want), NAMES[place]


def test_unwanted_gradients_are_not_computed(small: Adjacency) -> None:
    values = make_inputs(small, torch.float32, 20)
    grad = torch.ones(13, 6, 20, device=values[0].device)
    mask = [False, True, False, False, True, False]
    got = parity_backward.message_passing_parity_bwd(
        grad, *values, *_parity_walks(small.orders), small.node_graph, None, 0.0, mask
    )
    assert [g.numel() > 0 for g in got] == mask


def test_no_gradient_in_none_out(small: Adjacency) -> None:
    values = leaves(make_inputs(small, torch.float32, 20))
    out = message_passing_parity(*values, **settings(small, 0.3), backend="triton")
    assert not any(g.any() for g in gradients(out, values, torch.zeros_like(out)))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_infinite_and_missing_numbers_stay_in_their_rows(small: Adjacency, dropout: float) -> None:
    values = make_inputs(small, torch.float32, 20)
    values[0][3] = float("inf")
    values[1][0, 4] = float("nan")
    values[5][2, 1, 2] = float("inf")
    out = message_passing_parity(*values, **settings(small, dropout), backend="triton")
    wanted = message_passing_parity_ref(*values, **settings(small, dropout))
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(out.isinf(), wanted.isinf())
    assert 0 < int((~out.isfinite()).sum()) < out.numel() / 2


def test_both_paths_drop_the_same_and_so_do_the_gradients(small: Adjacency) -> None:
    """Where the torch path has zero the kernel has zero, forward and backward."""
    values = [x.abs() + 0.1 for x in make_inputs(small, torch.float32, 33, 5)]
    drop = dropped(torch.tensor(SEED), 13, 5, 33, 0.3).flatten(1, 2).to(values[0].device)
    tried = leaves(values)
    out = message_passing_parity(*tried, **settings(small, 0.3), backend="triton")
    assert torch.equal(out == 0, drop)
    # A gradient in dropped places alone reaches no input.
    assert not any(g.any() for g in gradients(out, tried, drop.float()))


def test_two_runs_are_bit_equal(tiny: Adjacency) -> None:
    inputs = leaves(make_inputs(tiny, torch.float32, 33))
    runs = []
    for _ in range(2):
        out = message_passing_parity(*inputs, **settings(tiny, 0.2), backend="triton")
        runs.append([out, *gradients(out, inputs, out.detach())])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
