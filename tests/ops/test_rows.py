"""Gathered and summed rows against loops and float64 references, with every gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dragkit_kernels import (
    FactGroups,
    FactIndex,
    fact_rows,
    gather_rows,
    gather_rows_ref,
    grouped_index,
    segment_sum,
    segment_sum_ref,
)
from dragkit_kernels.testing import (
    assert_close,
    fenced_allocations,
    gradients,
    leaves,
    random,
    random_adjacency,
    strided_like,
)
from tests.ops.cases import FORWARD, GRADIENT

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, *FORWARD], ids=str)
WIDTHS = pytest.mark.parametrize("width", [1, 7, 64, 257])
# Rows 0, 2, 5 and 7 are not gathered. Row 4 is gathered 75 times.
ROWS = torch.tensor([3, 1, 6, 3, 1, *[4] * 70, 6, *[4] * 5]).int()
# Segments 0, 2 and 5 have no rows. Segment 4 has more rows than a block.
SEGMENTS = torch.tensor([1, 1, 1, 3, *[4] * 70]).int()


def kernels_have(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels compute in float32")


def check(
    function: Callable, reference: Callable, values: list[Tensor], grad: Tensor | None = None
) -> None:
    """Asserts equality with the float64 reference and that the op writes all of its buffers."""
    tried, exact = leaves(values), leaves([x.double() for x in values])
    expected = reference(*exact)
    if not expected.requires_grad:  # no row was gathered
        actual = function(*tried)
        assert actual.dtype == values[0].dtype and torch.equal(actual.double(), expected)
        return
    if grad is None:
        grad = random(*expected.shape, seed=1).to(values[0].device, values[0].dtype)
    with fenced_allocations():
        actual = function(*tried)
        got = gradients(actual, tried, grad)
        zero_grads = gradients(function(*tried), tried, torch.zeros_like(grad))
    assert actual.dtype == values[0].dtype and actual.shape == expected.shape
    assert_close(actual, expected, tolerance=FORWARD.get(actual.dtype, 1e-12))
    for g, x, want in zip(got, values, gradients(expected, exact, grad), strict=True):
        assert g.dtype == x.dtype
        assert_close(g, want, tolerance=GRADIENT.get(g.dtype, 2e-12))
    assert not any(g.isfinite().logical_and(g != 0).any() for g in zero_grads)


def check_gather(table: Tensor, rows: Tensor, backend: str, grad: Tensor | None = None) -> None:
    for grouping in (None, grouped_index(rows, table.shape[0])):
        check(
            lambda x, grouping=grouping: gather_rows(x, rows, by_row=grouping, backend=backend),
            lambda x: gather_rows_ref(x, rows),
            [table],
            grad,
        )


def check_sum(
    value: Tensor, segment: Tensor, size: int, backend: str, grad: Tensor | None = None
) -> None:
    check(
        lambda x: segment_sum(x, segment, size, backend=backend),
        lambda x: segment_sum_ref(x, segment, size),
        [value],
        grad,
    )


@DTYPES
@WIDTHS
def test_gather_rows_and_segment_sum(
    backend: str, device: torch.device, dtype: torch.dtype, width: int
) -> None:
    kernels_have(backend, dtype)
    check_gather(random(8, width).to(device, dtype), ROWS.to(device), backend)
    value = random(SEGMENTS.numel(), width).to(device, dtype)
    check_sum(value, SEGMENTS.to(device), 6, backend)


def test_references_by_hand() -> None:
    table = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    assert gather_rows_ref(table, torch.tensor([2, 0, 2]).int()).tolist() == [
        [5, 6],
        [1, 2],
        [5, 6],
    ]
    total = segment_sum_ref(table, torch.tensor([1, 1, 3]).int(), 5)
    assert total.tolist() == [[0, 0], [4, 6], [0, 0], [5, 6], [0, 0]]


def looped_facts(
    node: Tensor, relation: Tensor, index: Tensor, fact_index: FactIndex, groups: FactGroups | None
) -> Tensor:
    rows = []
    for fact in index.flatten().tolist():
        if fact < 0:
            rows.append(node.new_zeros(2 * node.shape[1] + relation.shape[1]))
            continue
        q = fact if groups is None else int(groups.row[fact])
        parts = node[int(fact_index.head[q])], relation[int(fact_index.fact_pair[q])]
        rows.append(torch.cat([*parts, node[int(fact_index.tail[q])]]))
    width = 2 * node.shape[1] + relation.shape[1]
    return (
        torch.stack(rows).view(*index.shape, width) if rows else node.new_zeros(*index.shape, width)
    )


def make_facts(
    device: torch.device, sizes: list[tuple[int, int]]
) -> tuple[FactIndex, list[FactGroups | None], Tensor]:
    """A FactIndex, no groups and random groups, and selected facts with empty positions."""
    fact_index = random_adjacency(sizes, 4).fact_index
    facts, generator = fact_index.num_facts, torch.Generator().manual_seed(5)
    row = torch.randint(0, max(facts, 1), (3 * facts,), generator=generator).int()
    perm, ptr = grouped_index(row, facts)
    groups = FactGroups(*(x.to(device) for x in (row, ptr, perm)))
    index = torch.randint(-1, max(facts, 0), (3, 25), generator=generator).int()
    index[1] = -1
    index[2, 3] = facts - 1
    return FactIndex(*(x.to(device) for x in fact_index)), [None, groups], index.to(device)


def check_facts(
    values: list[Tensor],
    fact_index: FactIndex,
    groups: FactGroups | None,
    index: Tensor,
    backend: str,
    grad: Tensor | None = None,
) -> None:
    check(
        lambda x, y: fact_rows(x, y, index, fact_index=fact_index, groups=groups, backend=backend),
        lambda x, y: looped_facts(x, y, index, fact_index, groups),
        values,
        grad,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [[(5, 9), (0, 0), (4, 6)], [(0, 0), (3, 40), (2, 0)], [(3, 0), (2, 0)], [(0, 0)]],
    ids=str,
)
def test_fact_rows(
    backend: str, device: torch.device, dtype: torch.dtype, sizes: list[tuple[int, int]]
) -> None:
    """The packs have hubs and empty graphs. An empty selection works too."""
    kernels_have(backend, dtype)
    fact_index, groupings, index = make_facts(device, sizes)
    shapes = (fact_index.num_nodes, 5), (fact_index.num_pairs, 3)
    values = [random(*s).to(device, dtype) for s in shapes]
    for groups in groupings:
        check_facts(values, fact_index, groups, index, backend)
        check_facts(values, fact_index, groups, index[:, :0], backend)


def test_strided_inputs_and_gradients(backend: str, device: torch.device) -> None:
    fact_index, (_, groups), index = make_facts(device, [(5, 9), (4, 6)])
    rows, segment = strided_like(ROWS.to(device)), strided_like(SEGMENTS.to(device))
    node, pairs = (strided_like(random(n, 7).to(device)) for n in (9, fact_index.num_pairs))
    value = strided_like(random(segment.numel(), 7).to(device))
    one = torch.ones((), device=device)
    for make in (lambda *s: strided_like(random(*s).to(device)), lambda *s: one.expand(s)):
        check_gather(node, rows, backend, make(rows.numel(), 7))
        check_sum(value, segment, 6, backend, make(6, 7))
        grad = make(*index.shape, 21)
        check_facts([node, pairs], fact_index, groups, strided_like(index), backend, grad)


def test_empty_tables_and_selections(backend: str, device: torch.device) -> None:
    none, table = torch.zeros(0).int().to(device), random(3, 7).to(device)
    check_gather(table, none, backend)
    check_gather(table[:0], none, backend)
    check_gather(table[:, :0], none, backend)
    check_sum(table[:0], none, 4, backend)
    check_sum(table[:0], none, 0, backend)


def test_nan_and_infinity_stay_in_their_rows(backend: str, device: torch.device) -> None:
    node = random(9, 7).to(device)
    node[0, 1], node[4, 2] = math.nan, math.inf
    check_gather(node, torch.tensor([4, 0, 4]).int().to(device), backend)
    check_sum(node, torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2]).int().to(device), 4, backend)


def test_nan_at_an_empty_position_does_not_spread(backend: str, device: torch.device) -> None:
    fact_index = FactIndex(*(x.to(device) for x in random_adjacency([(5, 9)], 3).fact_index))
    values = leaves([x.to(device) for x in (random(5, 4), random(fact_index.num_pairs, 2))])
    index = torch.tensor([2, -1]).int().to(device)
    out = fact_rows(*values, index, fact_index=fact_index, backend=backend)
    grad = torch.ones_like(out)
    grad[1] = torch.nan
    assert all(bool(g.isfinite().all()) for g in gradients(out, values, grad))
    values[0].data[fact_index.head[0]] = torch.nan  # an empty position gathers fact 0
    assert not fact_rows(*values, index[1:], fact_index=fact_index, backend=backend).any()


def test_low_precision_sums_do_not_stall(backend: str, device: torch.device) -> None:
    """A bfloat16 sum of ones stops growing at 256."""
    rows = torch.zeros(2000).int().to(device)
    table = torch.ones(1, 1).to(device).bfloat16().requires_grad_()
    gather_rows(table, rows, backend=backend).sum().backward()
    assert table.grad.item() == 2000
    ones = torch.ones(2000, 1).to(device).bfloat16()
    assert segment_sum(ones, rows, 1, backend=backend).item() == 2000


def test_wrong_arguments() -> None:
    fact_index = random_adjacency([(5, 9)], 3).fact_index
    node, pairs = torch.randn(5, 4), torch.randn(fact_index.num_pairs, 2)
    rows, index = torch.zeros(3).int(), torch.zeros(2, 3).int()
    for call, message in (
        (lambda: gather_rows(node, index), r"gather_rows: rows must have shape \[\*\], got \[2, 3"),
        (lambda: gather_rows(node, rows.long()), "gather_rows: rows must be int32"),
        (
            lambda: gather_rows(node, rows, by_row=grouped_index(rows, 4)),
            r"by_row\.ptr must have shape \[6\], got \[5\]",
        ),
        (lambda: segment_sum(node, rows, 2), r"segment must have shape \[5\], got \[3\]"),
        (
            lambda: fact_rows(node[1:], pairs, index, fact_index=fact_index),
            r"fact_rows: node must have shape \[5, \*\], got \[4, 4",
        ),
        (
            lambda: fact_rows(node, pairs.double(), index, fact_index=fact_index),
            "must share a dtype, got torch.float32 and torch.float64",
        ),
        (
            lambda: fact_rows(node, pairs, index.long(), fact_index=fact_index),
            "fact_rows: index must be int32",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
