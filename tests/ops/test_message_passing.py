"""Message passing against a loop over facts, in every awkward shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dragkit_kernels import (
    build_fact_orders,
    message_passing,
    message_passing_ref,
)
from dragkit_kernels.testing import (
    Adjacency,
    assert_close,
    gradients,
    leaves,
    random_adjacency,
    strided_like,
)

NAMES = ("h", "p", "table_fwd", "table_inv", "self_table", "weight", "bias")
WIDTH = 7


def make_inputs(pack: Adjacency, dtype: torch.dtype, width: int = WIDTH) -> list[Tensor]:
    nodes, pairs = pack.orders.num_nodes, pack.orders.num_pairs
    graphs = len(pack.node_ptr) - 1
    shapes = [
        (nodes, width),
        (nodes,),
        (pairs, width),
        (pairs, width),
        (graphs, width),
        (width, width),
        (width,),
    ]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def loop_layer(pack: Adjacency, inputs: list[Tensor]) -> Tensor:
    """The layer's definition, one fact at a time, from the plain triples."""
    h, p, table_fwd, table_inv, self_table, weight, bias = inputs
    orders = pack.orders
    rows = {
        key: i
        for i, key in enumerate(
            sorted(set(zip(pack.fact_graph.tolist(), pack.relation.tolist(), strict=True)))
        )
    }
    pre = [
        bias + h[v] @ weight + p[v] * self_table[g] for v, g in enumerate(pack.node_graph.tolist())
    ]
    facts = zip(
        orders.head.tolist(),
        orders.tail.tolist(),
        pack.relation.tolist(),
        pack.fact_graph.tolist(),
        orders.head_count.tolist(),
        orders.tail_count.tolist(),
        strict=True,
    )
    for head, tail, relation, graph, head_count, tail_count in facts:
        row = rows[graph, relation]
        for _ in range(tail_count):
            pre[tail] = pre[tail] + p[head] * table_fwd[row]
        for _ in range(head_count):
            pre[head] = pre[head] + p[tail] * table_inv[row]
    return torch.stack(pre).clamp(min=0)


def run(pack: Adjacency, inputs: list[Tensor]) -> Tensor:
    return message_passing(*inputs, orders=pack.orders, node_graph=pack.node_graph)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_matches_the_loop_with_every_gradient(pack: Adjacency, dtype: torch.dtype) -> None:
    values = make_inputs(pack, dtype)
    exact, tried = leaves([x.double() for x in values]), leaves(values)
    expected, actual = loop_layer(pack, exact), run(pack, tried)
    assert actual.dtype == dtype
    assert_close(actual, expected, name="out")
    grad = torch.randn(expected.shape, dtype=torch.float64).to(dtype)
    for name, got, want in zip(
        NAMES,
        gradients(actual, tried, grad),
        gradients(expected, exact, grad.double()),
        strict=True,
    ):
        assert got.dtype == dtype
        assert_close(got, want, name=f"d{name}")


def test_mixed_precision_keeps_each_dtype() -> None:
    pack = random_adjacency([(9, 20), (4, 7)], 4)
    values = make_inputs(pack, torch.float32)
    for place in (0, 2, 3, 5):
        values[place] = values[place].bfloat16()
    tried = leaves(values)
    out = run(pack, tried)
    assert out.dtype == torch.bfloat16
    got = gradients(out, tried, torch.ones_like(out))
    assert [g.dtype for g in got] == [x.dtype for x in values]


def test_gradcheck() -> None:
    pack = random_adjacency([(4, 9), (0, 0), (3, 4)], 3)
    inputs = leaves(make_inputs(pack, torch.float64, width=3))
    assert torch.autograd.gradcheck(lambda *x: run(pack, list(x)), inputs)


def test_strided_inputs_and_expanded_gradient() -> None:
    pack = random_adjacency([(9, 20), (4, 7)], 4)
    values = make_inputs(pack, torch.float32)
    plain, roomy = leaves(values), leaves([strided_like(x) for x in values])
    roomy[5] = values[5].t().contiguous().t().detach().requires_grad_()
    assert not any(x.is_contiguous() for x in roomy)
    first, second = run(pack, plain), run(pack, roomy)
    assert_close(second, first.double())
    first.sum().backward()
    second.sum().backward()
    for name, x, y in zip(NAMES, plain, roomy, strict=True):
        assert_close(y.grad, x.grad.double(), name=name)
    expected = gradients(run(pack, plain), plain, torch.ones_like(first))
    for name, x, want in zip(NAMES, plain, expected, strict=True):
        assert torch.equal(x.grad, want), name


def test_column_major_gradient() -> None:
    pack = random_adjacency([(9, 20), (4, 7)], 4)
    inputs = leaves(make_inputs(pack, torch.float32))
    grad = torch.randn(WIDTH, 13).t()
    got = gradients(run(pack, inputs), inputs, grad)
    want = gradients(run(pack, inputs), inputs, grad.contiguous())
    for name, x, y in zip(NAMES, got, want, strict=True):
        assert_close(x, y.double(), name=name)


@pytest.mark.parametrize("place", range(len(NAMES)), ids=NAMES)
def test_each_gradient_alone(place: int) -> None:
    """The mask of wanted gradients must not change the wanted one."""
    pack = random_adjacency([(9, 20), (4, 7)], 4)
    values = make_inputs(pack, torch.float32)
    every = leaves(values)
    want = gradients(run(pack, every), every, torch.ones(13, WIDTH))[place]
    alone = [x.detach() for x in values]
    alone[place].requires_grad_()
    (got,) = gradients(run(pack, alone), [alone[place]], torch.ones(13, WIDTH))
    assert torch.equal(got, want)


def test_unwanted_gradients_are_not_computed() -> None:
    pack = random_adjacency([(9, 20), (4, 7)], 4)
    values = make_inputs(pack, torch.float32)
    out = run(pack, values)
    mask = [False, True, False, False, True, False, False]
    got = torch.ops.dragkit.message_passing_bwd(
        torch.ones_like(out), out, *values, list(pack.orders), pack.node_graph, mask, False
    )
    assert [g.numel() > 0 for g in got] == mask


def test_two_runs_are_bit_equal() -> None:
    pack = random_adjacency([(40, 300), (30, 200)], 5)
    inputs = leaves(make_inputs(pack, torch.float32, width=33))
    runs = []
    for _ in range(2):
        out = run(pack, inputs)
        runs.append([out, *gradients(out, inputs, out.detach())])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_uninitialised_memory_is_never_read() -> None:
    """Deterministic mode fills fresh memory with NaN."""
    pack = random_adjacency([(0, 0), (9, 20), (4, 0)], 4)
    inputs = leaves(make_inputs(pack, torch.float32))
    torch.use_deterministic_algorithms(True)
    try:
        out = run(pack, inputs)
        grads = gradients(out, inputs, torch.ones_like(out))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(x).all() for x in (out, *grads))


def test_order_of_facts_does_not_matter() -> None:
    pack = random_adjacency([(9, 20), (4, 7)], 4)
    inputs = make_inputs(pack, torch.float64)
    shuffle = torch.randperm(pack.orders.num_facts)
    shuffled = build_fact_orders(
        pack.orders.head[shuffle],
        pack.orders.tail[shuffle],
        pack.relation[shuffle],
        pack.orders.num_nodes,
        pack.fact_graph[shuffle],
        head_count=pack.orders.head_count[shuffle],
        tail_count=pack.orders.tail_count[shuffle],
    )
    other = message_passing(*inputs, orders=shuffled, node_graph=pack.node_graph)
    assert_close(other, run(pack, inputs))


def test_a_pack_equals_its_graphs_one_at_a_time() -> None:
    sizes = [(9, 20), (0, 0), (4, 7), (2, 0)]
    pack = random_adjacency(sizes, 4)
    inputs = make_inputs(pack, torch.float64)
    together = run(pack, inputs)
    pair_ptr = torch.searchsorted(pack.orders.pair_graph, torch.arange(5, dtype=torch.int32))
    for g in range(len(sizes)):
        nodes = slice(int(pack.node_ptr[g]), int(pack.node_ptr[g + 1]))
        facts = slice(int(pack.fact_ptr[g]), int(pack.fact_ptr[g + 1]))
        pairs = slice(int(pair_ptr[g]), int(pair_ptr[g + 1]))
        orders = build_fact_orders(
            pack.orders.head[facts] - nodes.start,
            pack.orders.tail[facts] - nodes.start,
            pack.relation[facts],
            nodes.stop - nodes.start,
            head_count=pack.orders.head_count[facts],
            tail_count=pack.orders.tail_count[facts],
        )
        h, p, table_fwd, table_inv, self_table, weight, bias = inputs
        alone = message_passing(
            h[nodes],
            p[nodes],
            table_fwd[pairs],
            table_inv[pairs],
            self_table[g : g + 1],
            weight,
            bias,
            orders=orders,
            node_graph=torch.zeros(nodes.stop - nodes.start, dtype=torch.int32),
        )
        assert_close(alone, together[nodes], name=f"graph {g}")


def test_reference_agrees_with_the_loop(pack: Adjacency) -> None:
    inputs = make_inputs(pack, torch.float64)
    out = message_passing_ref(*inputs, orders=pack.orders, node_graph=pack.node_graph)
    assert_close(out, loop_layer(pack, inputs))


@pytest.mark.parametrize(
    ("place", "bad", "message"),
    [
        (0, torch.zeros(12, WIDTH), r"h must have shape \[13, \*\], got \[12, 7\]"),
        (1, torch.zeros(13, 1), r"p must have shape \[13\], got \[13, 1\]"),
        (2, torch.zeros(1, WIDTH), r"table_fwd must have shape"),
        (5, torch.zeros(WIDTH, WIDTH + 1), r"weight must have shape \[7, 7\], got \[7, 8\]"),
        (6, torch.zeros(WIDTH, dtype=torch.int64), r"bias must be floating point"),
    ],
)
def test_wrong_arguments(place: int, bad: Tensor, message: str) -> None:
    pack = random_adjacency([(9, 20), (4, 7)], 4)
    inputs = make_inputs(pack, torch.float32)
    inputs[place] = bad
    with pytest.raises(ValueError, match=message):
        run(pack, inputs)


def test_int64_orders_are_refused() -> None:
    pack = random_adjacency([(9, 20), (4, 7)], 4)
    inputs = make_inputs(pack, torch.float32)
    orders = pack.orders._replace(tail_fact=pack.orders.tail_fact.long())
    with pytest.raises(ValueError, match=r"orders\.tail_fact must be int32"):
        message_passing(*inputs, orders=orders, node_graph=pack.node_graph)
    with pytest.raises(ValueError, match="node_graph must be int32"):
        message_passing(*inputs, orders=pack.orders, node_graph=pack.node_graph.long())
