"""Fact scores against the dot product of the wide vector they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dragkit_kernels import FactGroups, build_fact_orders, fact_scores, fact_scores_ref
from dragkit_kernels.testing import Adjacency, assert_close, leaves, random_adjacency, strided_like

NAMES = ("head_score", "pair_score", "tail_score", "bias")


def make_inputs(pack: Adjacency, dtype: torch.dtype) -> list[Tensor]:
    nodes, pairs = pack.orders.num_nodes, pack.orders.num_pairs
    return [torch.randn(shape).to(dtype) for shape in ((nodes,), (pairs,), (nodes,), ())]


@pytest.mark.parametrize("function", [fact_scores, fact_scores_ref])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_matches_the_loop_with_every_gradient(
    pack: Adjacency, dtype: torch.dtype, function: object
) -> None:
    inputs = leaves(make_inputs(pack, dtype))
    actual = function(*inputs, orders=pack.orders)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    a, b, c, bias = [x.detach().double() for x in inputs]
    wanted = [torch.zeros_like(x) for x in (a, b, c, bias)]
    grad = torch.randn(actual.shape, dtype=torch.float64)
    expected = torch.zeros_like(grad)
    pairs: dict[tuple[int, int], int] = {}
    for key in sorted(set(zip(pack.fact_graph.tolist(), pack.relation.tolist(), strict=True))):
        pairs[key] = len(pairs)
    for e in range(len(expected)):
        head, tail = int(pack.orders.head[e]), int(pack.orders.tail[e])
        pair = pairs[int(pack.fact_graph[e]), int(pack.relation[e])]
        expected[e] = a[head] + b[pair] + c[tail] + bias
        for want, row in zip(wanted, (head, pair, tail, ()), strict=True):
            want[row] += grad[e]
    assert_close(actual, expected)
    got = torch.autograd.grad(actual, inputs, grad.to(actual.dtype))
    for name, x, g, want in zip(NAMES, inputs, got, wanted, strict=True):
        assert g.dtype == x.dtype
        assert_close(g, want, name=name)


def test_equals_the_wide_linear_scorer() -> None:
    pack = random_adjacency([(9, 20), (4, 7)], 4)
    orders = pack.orders
    h = torch.randn(13, 6, dtype=torch.float64)
    x = torch.randn(orders.num_pairs, 5, dtype=torch.float64)
    w = torch.randn(17, dtype=torch.float64)
    wide = torch.cat([h[orders.head], x[orders.fact_pair], h[orders.tail]], dim=1)
    bias = torch.tensor(0.25, dtype=torch.float64)
    tables = (h @ w[:6], x @ w[6:11], h @ w[11:])
    assert_close(fact_scores(*tables, bias, orders=orders), wide @ w + 0.25)


@pytest.mark.parametrize("function", [fact_scores, fact_scores_ref])
def test_facts_of_a_group_share_a_row(function: object) -> None:
    """A gather by hand from the ungrouped scores, with every gradient; one row has no fact."""
    pack = random_adjacency([(9, 20), (4, 7)], 4)
    row = torch.randint(0, 26, (41,)).int()
    order = torch.argsort(row, stable=True).int()
    ptr = torch.cat([torch.zeros(1), torch.bincount(row, minlength=27).cumsum(0)]).int()
    groups = FactGroups(row, ptr, order)
    values = make_inputs(pack, torch.float64)
    tried, exact = leaves(values), leaves(values)
    actual = function(*tried, orders=pack.orders, groups=groups)
    expected = fact_scores_ref(*exact, orders=pack.orders)[row.long()]
    assert_close(actual, expected)
    grad = torch.randn(41, dtype=torch.float64)
    for name, got, want in zip(
        NAMES,
        torch.autograd.grad(actual, tried, grad),
        torch.autograd.grad(expected, exact, grad),
        strict=True,
    ):
        assert_close(got, want, name=name)
    with pytest.raises(ValueError, match=r"groups.ptr must have shape \[28\], got \[27\]"):
        fact_scores(*values, orders=pack.orders, groups=groups._replace(ptr=ptr[1:]))


def test_gradcheck() -> None:
    pack = random_adjacency([(4, 9), (0, 0), (3, 4)], 3)
    inputs = leaves(make_inputs(pack, torch.float64))
    assert torch.autograd.gradcheck(lambda *x: fact_scores(*x, orders=pack.orders), inputs)


def test_strided_inputs_and_expanded_gradient() -> None:
    pack = random_adjacency([(9, 20), (4, 7)], 4)
    values = make_inputs(pack, torch.float32)
    plain, roomy = leaves(values), leaves([strided_like(x) for x in values])
    fact_scores(*plain, orders=pack.orders).sum().backward()
    fact_scores(*roomy, orders=pack.orders).sum().backward()
    degree = torch.bincount(pack.orders.head, minlength=13).float()
    assert torch.equal(plain[0].grad, degree)
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(plain, roomy, strict=True))


def test_permuted_facts_give_permuted_scores_and_equal_gradients() -> None:
    pack = random_adjacency([(9, 20), (4, 7)], 4)
    order = torch.randperm(27)
    shuffled = build_fact_orders(
        pack.orders.head[order],
        pack.orders.tail[order],
        pack.relation[order],
        13,
        pack.fact_graph[order],
    )
    first, second = (leaves(make) for make in [make_inputs(pack, torch.float64)] * 2)
    x, y = fact_scores(*first, orders=pack.orders), fact_scores(*second, orders=shuffled)
    assert torch.equal(x[order], y)
    grad = torch.randn_like(x)
    for g, h in zip(
        torch.autograd.grad(x, first, grad),
        torch.autograd.grad(y, second, grad[order]),
        strict=True,
    ):
        assert_close(g, h)


def test_two_runs_are_bit_equal() -> None:
    pack = random_adjacency([(40, 3000)], 5)
    inputs = leaves(make_inputs(pack, torch.float32))
    grad = torch.randn(3000)
    runs = [
        torch.autograd.grad(fact_scores(*inputs, orders=pack.orders), inputs, grad)
        for _ in range(2)
    ]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("place", "bad", "message"),
    [
        (0, torch.zeros(12), r"head_score must have shape \[13\], got \[12\]"),
        (1, torch.zeros(1, 1), "pair_score must have shape"),
        (3, torch.zeros(1), r"bias must have shape \[\], got \[1\]"),
        (2, torch.zeros(13, dtype=torch.int32), "tail_score must be floating point"),
    ],
)
def test_wrong_arguments(place: int, bad: Tensor, message: str) -> None:
    pack = random_adjacency([(9, 20), (4, 7)], 4)
    inputs = make_inputs(pack, torch.float32)
    inputs[place] = bad
    with pytest.raises(ValueError, match=message):
        fact_scores(*inputs, orders=pack.orders)
