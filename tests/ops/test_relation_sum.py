"""The node start against a loop over facts."""

from __future__ import annotations

import pytest
import torch

from dragkit_kernels import relation_sum
from dragkit_kernels.testing import Adjacency, assert_close, leaves, random_adjacency, strided_like

WIDTH = 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_relation_sum_matches_the_loop(pack: Adjacency, dtype: torch.dtype) -> None:
    table = torch.randn(pack.orders.num_pairs, WIDTH).to(dtype)
    exact, tried = leaves([table.double()])[0], leaves([table])[0]
    rows = [torch.zeros(WIDTH, dtype=torch.float64) for _ in range(pack.orders.num_nodes)]
    for e, pair in enumerate(pack.orders.fact_pair.tolist()):
        for node, count in (
            (int(pack.orders.head[e]), int(pack.orders.head_count[e])),
            (int(pack.orders.tail[e]), int(pack.orders.tail_count[e])),
        ):
            rows[node] = rows[node] + count * exact[pair]
    expected, actual = torch.stack(rows), relation_sum(tried, orders=pack.orders)
    assert actual.dtype == dtype
    assert_close(actual, expected)
    if pack.orders.num_facts:
        expected.sum().backward()
        actual.sum().backward()
        assert_close(tried.grad, exact.grad)
        grad = torch.randn(expected.shape).to(dtype)
        (got,) = torch.autograd.grad(relation_sum(tried, orders=pack.orders), tried, grad)
        again = relation_sum(exact, orders=pack.orders)
        assert_close(got, torch.autograd.grad(again, exact, grad.double())[0])


def test_relation_sum_gradcheck() -> None:
    pack = random_adjacency([(4, 9), (0, 0), (3, 4)], 3)
    table = torch.randn(pack.orders.num_pairs, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: relation_sum(t, orders=pack.orders), (table,))


def test_strided_table() -> None:
    pack = random_adjacency([(4, 9), (3, 4)], 3)
    table = torch.randn(pack.orders.num_pairs, WIDTH)
    got = relation_sum(strided_like(table), orders=pack.orders)
    assert torch.equal(got, relation_sum(table, orders=pack.orders))


def test_wrong_table() -> None:
    pack = random_adjacency([(4, 9), (3, 4)], 3)
    rows = pack.orders.num_pairs
    with pytest.raises(ValueError, match=rf"table must have shape \[{rows}, \*\], got \[1, 7\]"):
        relation_sum(torch.zeros(1, WIDTH), orders=pack.orders)
