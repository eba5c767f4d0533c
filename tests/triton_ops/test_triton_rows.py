"""The kernels of gather_rows, segment_sum, fact_rows and gated_rows against float64 references."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dragkit_kernels import (
    FactGroups,
    FactOrders,
    fact_rows,
    fact_rows_ref,
    gated_rows,
    gated_rows_ref,
    gather_rows,
    gather_rows_ref,
    row_order,
    segment_sum,
    segment_sum_ref,
)
from dragkit_kernels.backend import INTERPRETED
from dragkit_kernels.rows import backward
from dragkit_kernels.testing import (
    assert_close,
    fenced_allocations,
    gradients,
    leaves,
    random_adjacency,
    strided_like,
)

# The interpreter cuts bfloat16 off where a GPU rounds.
FORWARD = {
    torch.float32: 2e-6,
    torch.bfloat16: 8e-3 if INTERPRETED else 4e-3,
    torch.float16: 1e-3,
}
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}
LOW = pytest.mark.parametrize("dtype", list(FORWARD), ids=str)
WIDTHS = pytest.mark.parametrize("width", [1, 7, 64, 96, 257])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(
    function: Callable, reference: Callable, values: list[Tensor], grad: Tensor | None = None
) -> None:
    """Result and gradients of kernels and float64 reference agree; every buffer is filled."""
    tried, exact = leaves(values), leaves([x.double() for x in values])
    expected = reference(*exact)
    if grad is None:
        grad = random(*expected.shape, seed=1).to(values[0].device, values[0].dtype)
    with fenced_allocations():
        actual = function(*tried)
        got = gradients(actual, tried, grad)
    assert actual.dtype == values[0].dtype and actual.shape == expected.shape
    assert_close(actual, expected, tolerance=FORWARD[actual.dtype])
    for g, x, want in zip(got, values, gradients(expected, exact, grad), strict=True):
        assert g.dtype == x.dtype
        assert_close(g, want, tolerance=GRADIENT[g.dtype])


def check_gather(table: Tensor, rows: Tensor, grad: Tensor | None = None) -> None:
    order = row_order(rows, table.shape[0])
    for given in (None, order):
        check(
            lambda x, given=given: gather_rows(x, rows, order=given, backend="triton"),
            lambda x: gather_rows_ref(x, rows),
            [table],
            grad,
        )


def check_sum(value: Tensor, segment: Tensor, size: int, grad: Tensor | None = None) -> None:
    check(
        lambda x: segment_sum(x, segment, size, backend="triton"),
        lambda x: segment_sum_ref(x, segment, size),
        [value],
        grad,
    )


def check_gated(vectors: Tensor, gate: Tensor, grad: Tensor | None = None) -> None:
    check(lambda x, y: gated_rows(x, y, backend="triton"), gated_rows_ref, [vectors, gate], grad)


# Rows that nobody gathers stand first, in the middle and last; one is gathered 75 times.
ROWS = torch.tensor([3, 1, 6, 3, 1, *[4] * 70, 6, *[4] * 5]).int()
# Segments without rows likewise; the last has more rows than a block.
SEGMENTS = torch.tensor([1, 1, 1, 3, *[4] * 70]).int()


@LOW
@WIDTHS
def test_gather_rows(device: torch.device, dtype: torch.dtype, width: int) -> None:
    check_gather(random(8, width).to(device, dtype), ROWS.to(device))


@LOW
@WIDTHS
def test_segment_sum(device: torch.device, dtype: torch.dtype, width: int) -> None:
    value = random(SEGMENTS.numel(), width).to(device, dtype)
    check_sum(value, SEGMENTS.to(device), 6)


@LOW
@pytest.mark.parametrize("width", [1, 7, 256, 300, 1030])
def test_gated_rows(device: torch.device, dtype: torch.dtype, width: int) -> None:
    gate = random(3, 3).sigmoid()
    gate[0, 1] = gate[2, 2] = 0.0
    check_gated(random(3, 3, width).to(device, dtype), gate.to(device))


def make_facts(
    device: torch.device, sizes: list[tuple[int, int]]
) -> tuple[FactOrders, list[FactGroups | None], Tensor]:
    """Orders, with and without groups, and places of which some are empty."""
    orders = random_adjacency(sizes, 4).orders
    generator = torch.Generator().manual_seed(5)
    facts = orders.num_facts
    row = torch.randint(0, max(facts, 1), (3 * facts,), generator=generator).int()
    ptr, order = row_order(row, facts).ptr, row_order(row, facts).place
    groups = FactGroups(*(x.to(device) for x in (row, ptr, order)))
    index = torch.randint(-1, max(facts, 0), (3, 25), generator=generator).int()
    index[1] = -1
    index[2, 3] = facts - 1
    return FactOrders(*(x.to(device) for x in orders)), [None, groups], index.to(device)


def check_facts(
    values: list[Tensor],
    orders: FactOrders,
    groups: FactGroups | None,
    index: Tensor,
    grad: Tensor | None = None,
) -> None:
    check(
        lambda x, y: fact_rows(x, y, index, orders=orders, groups=groups, backend="triton"),
        lambda x, y: fact_rows_ref(x, y, index, orders=orders, groups=groups),
        values,
        grad,
    )


@LOW
@pytest.mark.parametrize("widths", [(1, 1), (7, 7), (64, 96), (96, 64), (257, 257)], ids=str)
def test_fact_rows(device: torch.device, dtype: torch.dtype, widths: tuple[int, int]) -> None:
    orders, (_, groups), index = make_facts(device, [(5, 9), (0, 0), (4, 6)])
    sizes = (orders.num_nodes, widths[0]), (orders.num_pairs, widths[1])
    check_facts([random(*s).to(device, dtype) for s in sizes], orders, groups, index)


@pytest.mark.parametrize("sizes", [[(0, 0), (3, 40), (2, 0)], [(3, 0), (2, 0)], [(0, 0)]], ids=str)
def test_fact_rows_of_hubs_and_of_nothing(
    device: torch.device, sizes: list[tuple[int, int]]
) -> None:
    orders, both, index = make_facts(device, sizes)
    values = [random(n, 7).to(device) for n in (orders.num_nodes, orders.num_pairs)]
    for groups in both:
        check_facts(values, orders, groups, index)
        check_facts(values, orders, groups, index[:, :0])


def test_strided_inputs_and_gradients(device: torch.device) -> None:
    orders, (_, groups), index = make_facts(device, [(5, 9), (4, 6)])
    rows, segment = strided_like(ROWS.to(device)), strided_like(SEGMENTS.to(device))
    node, pairs = (strided_like(random(n, 7).to(device)) for n in (9, orders.num_pairs))
    value = strided_like(random(segment.numel(), 7).to(device))
    gate = strided_like(random(9).to(device))
    one = torch.ones((), device=device)
    for make in (lambda *s: strided_like(random(*s).to(device)), lambda *s: one.expand(s)):
        check_gather(node, rows, make(rows.numel(), 7))
        check_sum(value, segment, 6, make(6, 7))
        check_facts([node, pairs], orders, groups, strided_like(index), make(*index.shape, 21))
        check_gated(node, gate, make(9, 7))


def test_empty_tables_and_selections(device: torch.device) -> None:
    none = torch.zeros(0).int().to(device)
    table = random(3, 7).to(device)
    check_gather(table, none)
    check_gather(table[:0], none)
    check_gather(table[:, :0], none)
    check_sum(table[:0], none, 4)
    check_sum(table[:0], none, 0)
    check_gated(table[:0], random(0).to(device))
    check_gated(table[:, :0], random(3).to(device))


def test_nan_and_infinity_stay_in_their_rows(device: torch.device) -> None:
    orders, (_, groups), index = make_facts(device, [(5, 9), (4, 6)])
    node, pairs = random(9, 7).to(device), random(orders.num_pairs, 7).to(device)
    node[0, 1], node[4, 2], pairs[2, 3] = math.nan, math.inf, -math.inf
    check_facts([node, pairs], orders, groups, index)
    grad = random(*index.shape, 21).to(device)
    grad[0, 0, 1], grad[2, 3, 9], grad[0, 2, 20] = math.nan, math.inf, -math.inf
    grad[1] = math.nan  # empty places
    exact = grad.double().masked_fill((index < 0).unsqueeze(-1), 0.0)
    plain, tried = leaves([node.double(), pairs.double()]), leaves([node, pairs])
    expected = fact_rows_ref(*plain, index, orders=orders, groups=groups)
    actual = fact_rows(*tried, index, orders=orders, groups=groups, backend="triton")
    for got, want in zip(
        gradients(actual, tried, grad), gradients(expected, plain, exact), strict=True
    ):
        assert_close(got, want)
    gate = random(9).to(device)
    check_gather(node, torch.tensor([4, 0, 4]).int().to(device))
    check_sum(node, torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2]).int().to(device), 4)
    check_gated(node, gate)
    gate[3], gate[5] = math.nan, math.inf
    check_gated(node, gate)


def test_no_gradient_in_none_out(device: torch.device) -> None:
    orders, (_, groups), index = make_facts(device, [(5, 9), (4, 6)])
    node, pairs, gate = leaves(
        [x.to(device) for x in (random(9, 7), random(orders.num_pairs, 7), random(9))]
    )
    with fenced_allocations():
        for out, inputs in (
            (gather_rows(node, ROWS.to(device), backend="triton"), [node]),
            (fact_rows(node, pairs, index, orders=orders, groups=groups, backend="triton"),
             [node, pairs]),
            (gated_rows(node, gate, backend="triton"), [node, gate]),
        ):  # fmt: skip
            assert not any(g.any() for g in gradients(out, inputs, torch.zeros_like(out)))


def test_gradients_nobody_wants_are_not_computed(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sum for one table; the gates' kernel is told to leave out what has no place to go."""
    orders, (_, groups), index = make_facts(device, [(5, 9), (4, 6)])
    values = [random(9, 7).to(device), random(orders.num_pairs, 7).to(device)]
    launched: list[dict] = []
    sum_by = backward.sum_by
    monkeypatch.setattr(
        backward, "sum_by", lambda *x, **piece: launched.append(piece) or sum_by(*x, **piece)
    )
    for place, first in ((0, None), (1, 7)):
        tried = [x.clone().requires_grad_(i == place) for i, x in enumerate(values)]
        out = fact_rows(*tried, index, orders=orders, groups=groups, backend="triton")
        torch.autograd.grad(out.sum(), tried[place])
        assert len(launched) == 1 and launched.pop().get("first") == first
    gated = [values[0], random(9).to(device)]
    for place in (0, 1):
        tried = [x.clone().requires_grad_(i == place) for i, x in enumerate(gated)]
        out = gated_rows(*tried, backend="triton")
        grad = torch.ones_like(out)
        (got,) = torch.autograd.grad(out, tried[place], grad)
        mask = [place == 0, place == 1]
        other = torch.ops.dragkit.gated_rows_bwd(grad, *gated, mask, True)[1 - place]
        assert got.shape == gated[place].shape and other.numel() == 0


def test_two_runs_are_bit_equal(device: torch.device) -> None:
    orders, (_, groups), index = make_facts(device, [(3, 40), (4, 6)])
    values = leaves([random(7, 7).to(device), random(orders.num_pairs, 7).to(device)])
    table = random(8, 7).to(device).requires_grad_()
    runs = []
    for _ in range(2):
        rows = fact_rows(*values, index, orders=orders, groups=groups, backend="triton")
        gathered = gather_rows(table, ROWS.to(device), backend="triton")
        total = segment_sum(random(74, 7).to(device), SEGMENTS.to(device), 6, backend="triton")
        runs.append(
            [
                *(rows, gathered, total),
                *gradients(rows, values, random(*rows.shape).to(device)),
                *gradients(gathered, [table], random(*gathered.shape).to(device)),
            ]
        )
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
