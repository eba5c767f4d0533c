"""The kernels of fact_scores against the reference, with gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dragkit_kernels import FactGroups, FactOrders, fact_scores, fact_scores_ref
from dragkit_kernels.testing import (
    assert_close,
    fenced_allocations,
    gradients,
    leaves,
    random_adjacency,
    strided_like,
)

# The last pack has rows of more facts than are taken at a time.
SIZES = [
    [(0, 0), (5, 12), (1, 3), (0, 0), (34, 71), (4, 0), (0, 0)],
    [(3, 0), (2, 0)],
    [(0, 0)],
    [(40, 700), (3, 5)],
]


def fact_groups(rows: int, facts: int, device: torch.device) -> FactGroups:
    """Facts that stand for random rows: some for none, some for many."""
    generator = torch.Generator().manual_seed(facts)
    row = (torch.rand(facts, generator=generator) ** 2 * rows).long()
    ptr = torch.zeros(rows + 1, dtype=torch.int64)
    ptr[1:] = torch.bincount(row, minlength=rows).cumsum(0)
    columns = (row, ptr, torch.argsort(row, stable=True))
    return FactGroups(*(x.int().to(device) for x in columns))


def check(values: list[Tensor], orders: FactOrders, groups: FactGroups | None) -> None:
    tried, exact = leaves(values), leaves([x.double() for x in values])
    expected = fact_scores_ref(*exact, orders=orders, groups=groups)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    grad = strided_like(grad.to(expected.device))
    with fenced_allocations():
        actual = fact_scores(*tried, orders=orders, groups=groups, backend="triton")
        got = gradients(actual, tried, grad)
    assert actual.dtype == torch.float32
    assert_close(actual, expected, tolerance=2e-6)
    for x, g, want in zip(values, got, gradients(expected, exact, grad), strict=True):
        assert g.dtype == x.dtype
        assert_close(g, want)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matches_the_reference(
    device: torch.device, dtype: torch.dtype, sizes: list[tuple[int, int]]
) -> None:
    orders = random_adjacency(sizes, 6).orders
    orders = FactOrders(*(x.to(device) for x in orders))
    shapes = ((orders.num_nodes,), (orders.num_pairs,), (orders.num_nodes,), ())
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
    check(values, orders, None)
    check([strided_like(x) for x in values], orders, None)
    if orders.num_facts > 0:
        check(values, orders, fact_groups(orders.num_facts, 1100, device))


def test_two_runs_are_bit_equal(device: torch.device) -> None:
    orders = random_adjacency([(40, 700)], 6).orders
    orders = FactOrders(*(x.to(device) for x in orders))
    shapes = ((40,), (orders.num_pairs,), (40,), ())
    values = leaves([torch.randn(s, device=device) for s in shapes])
    grad = torch.randn(700, device=device)
    runs = []
    for _ in range(2):
        score = fact_scores(*values, orders=orders, backend="triton")
        runs.append([score, *gradients(score, values, grad)])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
