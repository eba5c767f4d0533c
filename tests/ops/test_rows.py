"""Gathered, added and gated rows against loops over places, with every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dragkit_kernels import (
    FactGroups,
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
from dragkit_kernels.testing import (
    Adjacency,
    assert_close,
    gradients,
    leaves,
    random_adjacency,
    strided_like,
)

LOW = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", list(LOW), ids=str)
OPS = torch.ops.dragkit


def fact_groups(rows: int) -> FactGroups:
    """Two facts for every row, each row's not side by side."""
    row = torch.arange(2 * rows, dtype=torch.int32) % rows
    ptr = torch.arange(rows + 1, dtype=torch.int32) * 2
    return FactGroups(row, ptr, torch.argsort(row, stable=True).int())


def looped_gather(table: Tensor, rows: Tensor) -> Tensor:
    return torch.stack([table[r] for r in rows.tolist()]) if len(rows) else table[:0]


def looped_sum(value: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    parts = [[] for _ in range(num_segments)]
    for t, b in enumerate(segment.tolist()):
        parts[b].append(value[t])
    empty = value.new_zeros(value.shape[1])
    return torch.stack([sum(part, empty) for part in parts])


def looped_facts(
    node: Tensor, relation: Tensor, index: Tensor, pack: Adjacency, groups: FactGroups | None
) -> Tensor:
    orders, rows = pack.orders, []
    for fact in index.flatten().tolist():
        if fact < 0:
            rows.append(node.new_zeros(2 * node.shape[1] + relation.shape[1]))
            continue
        q = fact if groups is None else int(groups.row[fact])
        parts = node[int(orders.head[q])], relation[int(orders.fact_pair[q])]
        rows.append(torch.cat([*parts, node[int(orders.tail[q])]]))
    return torch.stack(rows).view(*index.shape, -1)


def check(function: Callable, truth: Callable, values: list[Tensor], dtype: torch.dtype) -> None:
    """Results and gradients of low precision and of a float64 loop over its values agree."""
    values = [x.to(dtype) for x in values]
    tried, exact = leaves(values), leaves([x.double() for x in values])
    expected = truth(*exact)
    actual = function(*tried)
    assert actual.dtype == dtype
    assert_close(actual, expected, tolerance=LOW[dtype])
    grad = torch.randn_like(expected).to(dtype)
    wanted = gradients(expected, exact, grad.double())
    for got, want in zip(gradients(actual, tried, grad), wanted, strict=True):
        assert got.dtype == dtype
        assert_close(got, want, tolerance=2 * LOW[dtype])
    nothing = torch.zeros_like(grad)
    assert not any(g.any() for g in gradients(function(*tried), tried, nothing))


@DTYPES
@pytest.mark.parametrize("function", [gather_rows, gather_rows_ref])
def test_gather_rows(dtype: torch.dtype, function: Callable) -> None:
    rows = torch.tensor([4, 0, 4, 4, 2, 6]).int()
    table = torch.randn(7, 5)
    check(lambda x: function(x, rows), lambda x: looped_gather(x, rows), [table], dtype)


@DTYPES
@pytest.mark.parametrize("function", [segment_sum, segment_sum_ref])
def test_segment_sum(dtype: torch.dtype, function: Callable) -> None:
    segment = torch.tensor([1, 1, 1, 3, 4, 4]).int()
    value = torch.randn(6, 5)
    check(lambda x: function(x, segment, 6), lambda x: looped_sum(x, segment, 6), [value], dtype)


@DTYPES
@pytest.mark.parametrize("function", [fact_rows, fact_rows_ref])
@pytest.mark.parametrize("grouped", [False, True])
def test_fact_rows(dtype: torch.dtype, function: Callable, grouped: bool) -> None:
    pack = random_adjacency([(5, 9), (0, 0), (4, 6)], 4)
    groups = fact_groups(15) if grouped else None
    last = 29 if grouped else 14
    index = torch.tensor([[3, 0, 7, -1], [-1, -1, -1, -1], [last, 9, 3, 10]]).int()
    values = [torch.randn(9, 5), torch.randn(pack.orders.num_pairs, 3)]
    check(
        lambda x, y: function(x, y, index, orders=pack.orders, groups=groups),
        lambda x, y: looped_facts(x, y, index, pack, groups),
        values,
        dtype,
    )


@DTYPES
@pytest.mark.parametrize("function", [gated_rows, gated_rows_ref])
def test_gated_rows(dtype: torch.dtype, function: Callable) -> None:
    gate = torch.rand(3, 4)
    gate[0, 1] = gate[2, 3] = 0.0
    vectors = torch.randn(3, 4, 5)

    def looped(vectors: Tensor, gate: Tensor) -> Tensor:
        pairs = zip(vectors.flatten(0, 1), gate.flatten(), strict=True)
        return torch.stack([v * g for v, g in pairs]).view(vectors.shape)

    check(function, looped, [vectors, gate], dtype)


def test_a_float32_gate_keeps_the_dtype_of_the_vectors() -> None:
    vectors, gate = leaves([torch.randn(3, 4, 5).bfloat16(), torch.rand(3, 4)])
    out = gated_rows(vectors, gate)
    d_vectors, d_gate = gradients(out, [vectors, gate], torch.randn(3, 4, 5))
    assert out.dtype == d_vectors.dtype == torch.bfloat16 and d_gate.dtype == torch.float32
    exact = gated_rows(vectors.double(), gate.double())
    assert_close(out, exact, tolerance=4e-3)
    assert gated_rows(vectors.float(), gate.double()).dtype == torch.float32


def test_low_precision_sums_do_not_stall() -> None:
    """Adding ones in bfloat16 stops at 256."""
    rows = torch.zeros(2000).int()
    table = torch.ones(1, 1).bfloat16().requires_grad_()
    gather_rows(table, rows).sum().backward()
    assert table.grad.item() == 2000
    assert segment_sum(torch.ones(2000, 1).bfloat16(), rows, 1).item() == 2000


def test_empty_graphs_and_selections() -> None:
    for sizes in ([(3, 0), (2, 0)], [(0, 0)], [(5, 9)]):
        orders = random_adjacency(sizes, 3).orders
        values = leaves([torch.randn(orders.num_nodes, 4), torch.randn(orders.num_pairs, 2)])
        for shape in ((2, 0), (2, 3), (0,)):
            index = torch.full(shape, -1, dtype=torch.int32)
            for groups in (None, fact_groups(orders.num_facts)):
                out = fact_rows(*values, index, orders=orders, groups=groups)
                assert out.shape == (*shape, 10) and not out.any()
                grads = torch.autograd.grad(out.sum() + 0 * values[0].sum(), values)
                assert not any(g.any() for g in grads)
    table = torch.randn(3, 4)
    assert gather_rows(table, torch.zeros(0).int()).shape == (0, 4)
    assert not segment_sum(table[:0], torch.zeros(0).int(), 2).any()
    assert segment_sum(table[:0], torch.zeros(0).int(), 0).shape == (0, 4)
    assert gated_rows(torch.zeros(2, 0, 4), torch.zeros(2, 0)).shape == (2, 0, 4)


def test_what_stands_at_an_empty_place_reaches_nothing() -> None:
    pack = random_adjacency([(5, 9)], 3)
    values = leaves([torch.randn(5, 4), torch.randn(pack.orders.num_pairs, 2)])
    index = torch.tensor([2, -1]).int()
    out = fact_rows(*values, index, orders=pack.orders)
    grad = torch.ones_like(out)
    grad[1] = torch.nan
    assert all(bool(g.isfinite().all()) for g in gradients(out, values, grad))
    values[0].data[0] = torch.nan  # row 0 stands in at empty places
    assert not fact_rows(*values, index[1:], orders=pack.orders).any()


def test_strides_of_inputs_and_gradients() -> None:
    pack = random_adjacency([(5, 9)], 3)
    rows = torch.tensor([1, 4, 4, 0]).int()
    index = torch.tensor([[0, 8], [-1, 3]]).int()
    segment = torch.tensor([0, 0, 1, 1, 2]).int()
    pairs = torch.randn(pack.orders.num_pairs, 2)
    node, gate = torch.randn(5, 4), torch.rand(5)
    for function, values in (
        (lambda x: gather_rows(x, strided_like(rows)), [node]),
        (lambda x: segment_sum(x, strided_like(segment), 3), [node]),
        (lambda x, y: fact_rows(x, y, strided_like(index), orders=pack.orders), [node, pairs]),
        (gated_rows, [node, gate]),
    ):
        plain, roomy = leaves(values), leaves([strided_like(x) for x in values])
        function(*plain).sum().backward()
        function(*roomy).sum().backward()  # a gradient of stride zero
        for x, y in zip(plain, roomy, strict=True):
            assert_close(y.grad, x.grad.double())


def cases() -> dict[str, tuple]:
    """Forward arguments of every op without the flag, and those of its backward."""
    pack = random_adjacency([(5, 9), (0, 0), (4, 6)], 4)
    orders, rows = pack.orders, torch.tensor([4, 0, 4, 2]).int()
    node, pairs = torch.randn(9, 5), torch.randn(orders.num_pairs, 3)
    index = torch.tensor([3, 0, -1, 14, 3]).int()
    facts = (index, orders.head, orders.fact_pair, orders.tail)
    sizes = (9, orders.num_pairs, 5)
    order = row_order(rows, 9)
    segment, gate = torch.tensor([0, 0, 1, 3]).int(), torch.rand(9)
    grad, wide = torch.randn(4, 5), torch.randn(5, 13)
    masks = ([True, True], [True, False], [False, True])
    group_row = torch.arange(15, dtype=torch.int32)
    return {
        "gather_rows": ((node, rows, None, None), [(grad, rows, None, None, 9)]),
        "gather_rows, ordered": ((node, rows, *order), [(grad, rows, *order, 9)]),
        "segment_sum": ((grad, segment, 5), [(node[:5], segment)]),
        "fact_rows": (
            (node, pairs, *facts, None),
            [(wide, *facts, None, *sizes, mask) for mask in masks],
        ),
        "fact_rows, grouped": (
            (node, pairs, *facts, group_row),
            [(wide, *facts, group_row, *sizes, masks[0])],
        ),
        "gated_rows": ((node, gate), [(node, node.clone(), gate, mask) for mask in masks]),
    }


@pytest.mark.parametrize("name", cases())
def test_opcheck(name: str) -> None:
    forward, backward = cases()[name]
    op = name.split(",")[0]
    wanting = [
        x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in forward
    ]
    torch.library.opcheck(getattr(OPS, f"{op}_fwd").default, (*wanting, False))
    for arguments in backward:
        torch.library.opcheck(getattr(OPS, f"{op}_bwd").default, (*arguments, False))


@pytest.mark.parametrize("name", cases())
def test_gradcheck_and_no_second_derivative(name: str) -> None:
    forward, _ = cases()[name]
    op = getattr(OPS, f"{name.split(',')[0]}_fwd")
    double = [
        x.double().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in forward
    ]
    inputs = [x for x in double if isinstance(x, Tensor) and x.requires_grad]
    rest = double[len(inputs) :]
    assert torch.autograd.gradcheck(lambda *x: op(*x, *rest, False), inputs)
    first = torch.autograd.grad(op(*inputs, *rest, False).pow(2).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="_bwd has no derivative"):
        sum(g.sum() for g in first).backward()


def chained(pack: Adjacency, node: Tensor, pairs: Tensor, gate: Tensor, index: Tensor) -> Tensor:
    """All four ops after one another: [B, 2C + D]."""
    graphs = pack.node_ptr.shape[0] - 1
    total = segment_sum(gather_rows(node, pack.orders.head), pack.fact_graph, graphs)
    rows = fact_rows(torch.relu(node), pairs, index, orders=pack.orders)
    return gated_rows(rows, gate).sum(1) + torch.nn.functional.pad(total, (0, pairs.shape[1] + 5))


def test_compiled_equals_eager_for_any_size() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(chained, fullgraph=True, backend="aot_eager", dynamic=True)
    for sizes in ([(6, 9), (13, 20), (5, 4)], [(4, 7), (0, 0), (9, 30), (2, 2)]):
        pack = random_adjacency(sizes, 6)
        index = torch.randint(-1, pack.orders.num_facts, (len(sizes), 7)).int()
        inputs = leaves(
            [
                torch.randn(pack.orders.num_nodes, 5),
                torch.randn(pack.orders.num_pairs, 3),
                torch.rand(len(sizes), 7),
            ]
        )
        outputs = []
        for function in (chained, compiled):
            out = function(pack, *inputs, index)
            outputs.append([out, *torch.autograd.grad(out.pow(2).sum(), inputs)])
        for want, got in zip(*outputs, strict=True):
            assert_close(got, want.double())


def test_wrong_arguments() -> None:
    pack = random_adjacency([(5, 9)], 3)
    node, pairs = torch.randn(5, 4), torch.randn(pack.orders.num_pairs, 2)
    rows, index = torch.zeros(3).int(), torch.zeros(2, 3).int()
    with pytest.raises(ValueError, match=r"gather_rows: rows must have shape \[\*\], got \[2, 3\]"):
        gather_rows(node, index)
    with pytest.raises(ValueError, match="gather_rows: rows must be int32"):
        gather_rows(node, rows.long())
    with pytest.raises(ValueError, match=r"order.ptr must have shape \[6\], got \[5\]"):
        gather_rows(node, rows, order=row_order(rows, 4))
    with pytest.raises(ValueError, match=r"segment_sum: segment must have shape \[5\], got \[3\]"):
        segment_sum(node, rows, 2)
    with pytest.raises(ValueError, match=r"fact_rows: node must have shape \[5, \*\], got \[4, 4"):
        fact_rows(node[1:], pairs, index, orders=pack.orders)
    with pytest.raises(ValueError, match="must share a dtype, got torch.float32 and torch.float64"):
        fact_rows(node, pairs.double(), index, orders=pack.orders)
    with pytest.raises(ValueError, match="fact_rows: index must be int32"):
        fact_rows(node, pairs, index.long(), orders=pack.orders)
    with pytest.raises(ValueError, match=r"gated_rows: gate must have shape \[5\], got \[3\]"):
        gated_rows(node, torch.rand(3))
    with pytest.raises(ValueError, match="gated_rows: gate must be floating point"):
        gated_rows(node, torch.zeros(5).int())
