"""Fact scores against loops and against the wide linear layer, with every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dragkit_kernels import (
    FactGroups,
    FactIndex,
    build_fact_index,
    fact_scores,
    fact_scores_ref,
    grouped_index,
)
from dragkit_kernels.testing import (
    Adjacency,
    assert_close,
    fenced_allocations,
    gradients,
    leaves,
    random,
    random_adjacency,
    strided_like,
    to_device,
)

NAMES = ("head_score", "pair_score", "tail_score", "bias")
# The last pack has rows with more facts than one step of a program.
SIZES = [
    [(0, 0), (5, 12), (1, 3), (0, 0), (34, 71), (4, 0), (0, 0)],
    [(3, 0), (2, 0)],
    [(0, 0)],
    [(40, 700), (3, 5)],
]


def make_inputs(fact_index: FactIndex, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((fact_index.num_nodes,), (fact_index.num_pairs,), (fact_index.num_nodes,), ())
    return [random(*s, seed=i).to(device, dtype) for i, s in enumerate(shapes)]


def fact_groups(rows: int, facts: int) -> FactGroups:
    """Facts of random merged facts. Some merged facts have none, some have many."""
    generator = torch.Generator().manual_seed(facts)
    row = (torch.rand(facts, generator=generator) ** 2 * rows).int()
    perm, ptr = grouped_index(row, rows)
    return FactGroups(row, ptr, perm)


def test_the_reference_matches_the_loop_with_every_gradient(pack: Adjacency) -> None:
    inputs = leaves(make_inputs(pack.fact_index, torch.device("cpu"), torch.float64))
    a, b, c, bias = [x.detach() for x in inputs]
    wanted = [torch.zeros_like(x) for x in (a, b, c, bias)]
    grad = torch.randn(pack.fact_index.num_facts, dtype=torch.float64)
    expected = torch.zeros_like(grad)
    pairs: dict[tuple[int, int], int] = {}
    for key in sorted(set(zip(pack.fact_graph.tolist(), pack.relation.tolist(), strict=True))):
        pairs[key] = len(pairs)
    for e in range(len(expected)):
        head, tail = int(pack.fact_index.head[e]), int(pack.fact_index.tail[e])
        pair = pairs[int(pack.fact_graph[e]), int(pack.relation[e])]
        expected[e] = a[head] + b[pair] + c[tail] + bias
        for want, row in zip(wanted, (head, pair, tail, ()), strict=True):
            want[row] += grad[e]
    for function in (fact_scores_ref, fact_scores):
        actual = function(*inputs, fact_index=pack.fact_index)
        assert_close(actual, expected)
        got = torch.autograd.grad(actual, inputs, grad)
        for name, g, want in zip(NAMES, got, wanted, strict=True):
            assert_close(g, want, name=name)


def check(
    values: list[Tensor], fact_index: FactIndex, groups: FactGroups | None, backend: str
) -> None:
    tried, exact = leaves(values), leaves([x.double() for x in values])
    expected = fact_scores_ref(*exact, fact_index=fact_index)
    if groups is not None:
        expected = expected[groups.row.long()]
    grad = strided_like(random(*expected.shape, seed=9).to(expected.device))
    with fenced_allocations():
        actual = fact_scores(*tried, fact_index=fact_index, groups=groups, backend=backend)
        got = gradients(actual, tried, grad)
    assert actual.dtype == torch.float32
    assert_close(actual, expected, tolerance=2e-6)
    for name, x, g, want in zip(NAMES, values, got, gradients(expected, exact, grad), strict=True):
        assert g.dtype == x.dtype
        assert_close(g, want, name=name)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matches_the_reference(
    backend: str, device: torch.device, dtype: torch.dtype, sizes: list[tuple[int, int]]
) -> None:
    """With and without groups, and with strided inputs. A merged fact may stand for none."""
    fact_index = to_device(random_adjacency(sizes, 6), device).fact_index
    values = make_inputs(fact_index, device, dtype)
    check(values, fact_index, None, backend)
    check([strided_like(x) for x in values], fact_index, None, backend)
    if fact_index.num_facts > 0:
        groups = fact_groups(fact_index.num_facts, 1100)
        groups = FactGroups(*(x.to(device) for x in groups))
        check(values, fact_index, groups, backend)
        ref = fact_scores_ref(*values, fact_index=fact_index, groups=groups)
        assert torch.equal(ref, fact_scores_ref(*values, fact_index=fact_index)[groups.row.long()])


def test_equals_the_wide_linear_scorer() -> None:
    fact_index = random_adjacency([(9, 20), (4, 7)], 4).fact_index
    h, x = random(13, 6).double(), random(fact_index.num_pairs, 5).double()
    w, bias = random(17).double(), torch.tensor(0.25, dtype=torch.float64)
    wide = torch.cat([h[fact_index.head], x[fact_index.fact_pair], h[fact_index.tail]], dim=1)
    tables = (h @ w[:6], x @ w[6:11], h @ w[11:])
    assert_close(fact_scores(*tables, bias, fact_index=fact_index), wide @ w + 0.25)


def test_permuted_facts_give_permuted_scores_and_equal_gradients() -> None:
    pack = random_adjacency([(9, 20), (4, 7)], 4)
    order, o = torch.randperm(27), pack.fact_index
    columns = (o.head[order], o.tail[order], pack.relation[order])
    shuffled = build_fact_index(*columns, 13, pack.fact_graph[order])
    values = make_inputs(o, torch.device("cpu"), torch.float64)
    first, second = leaves(values), leaves(values)
    x, y = fact_scores(*first, fact_index=o), fact_scores(*second, fact_index=shuffled)
    assert torch.equal(x[order], y)
    grad = torch.randn_like(x)
    for g, h in zip(gradients(x, first, grad), gradients(y, second, grad[order]), strict=True):
        assert_close(g, h)


def test_an_expanded_gradient(backend: str, device: torch.device) -> None:
    fact_index = to_device(random_adjacency([(40, 700)], 6), device).fact_index
    values = leaves(make_inputs(fact_index, device, torch.float32))
    fact_scores(*values, fact_index=fact_index, backend=backend).sum().backward()
    assert torch.equal(values[0].grad, torch.bincount(fact_index.head, minlength=40).float())


@pytest.mark.parametrize(
    ("argument", "bad", "message"),
    [
        (0, torch.zeros(12), r"head_score must have shape \[13\], got \[12\]"),
        (1, torch.zeros(1, 1), "pair_score must have shape"),
        (3, torch.zeros(1), r"bias must have shape \[\], got \[1\]"),
        (2, torch.zeros(13, dtype=torch.int32), "tail_score must be floating point"),
    ],
)
def test_wrong_arguments(argument: int, bad: Tensor, message: str) -> None:
    fact_index = random_adjacency([(9, 20), (4, 7)], 4).fact_index
    inputs = make_inputs(fact_index, torch.device("cpu"), torch.float32)
    groups = fact_groups(27, 41)
    with pytest.raises(ValueError, match=r"groups.ptr must have shape \[28\], got \[27\]"):
        fact_scores(*inputs, fact_index=fact_index, groups=groups._replace(ptr=groups.ptr[1:]))
    inputs[argument] = bad
    with pytest.raises(ValueError, match=message):
        fact_scores(*inputs, fact_index=fact_index)
