"""Gated relation rows against a loop over pairs."""

from __future__ import annotations

import pytest
import torch

from dragkit_kernels import relation_gate, relation_gate_ref, row_order
from dragkit_kernels.testing import assert_close, gradients, leaves, strided_like


def make(pairs: int, instructions: int, dtype: torch.dtype = torch.float64) -> list:
    rows = torch.randint(0, 5, (pairs,)).int(), torch.randint(0, 3, (pairs,)).int()
    return [torch.randn(2, 5, 7).to(dtype), torch.randn(3, instructions, 7).to(dtype), *rows]


@pytest.mark.parametrize("function", [relation_gate, relation_gate_ref])
@pytest.mark.parametrize("pairs,instructions", [(0, 2), (1, 1), (13, 1), (13, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_matches_the_loop_with_every_gradient(
    pairs: int, instructions: int, dtype: torch.dtype, function: object
) -> None:
    *values, relation, graph = make(pairs, instructions, dtype)
    tried, exact = leaves(values), leaves([x.double() for x in values])
    actual = function(*tried, relation, graph)
    u, i = exact
    rows = [
        torch.stack(
            [
                torch.stack([(u[d, r] * i[g, k]).clamp(min=0) for k in range(instructions)])
                for r, g in zip(relation.tolist(), graph.tolist(), strict=True)
            ]
        )
        if pairs
        else u[d, :0].unsqueeze(1).expand(0, instructions, 7)
        for d in (0, 1)
    ]
    expected = torch.stack(rows)
    assert actual.dtype == dtype
    assert_close(actual, expected)
    if not pairs:
        return
    grad = torch.randn(expected.shape, dtype=torch.float64).to(dtype)
    wanted = gradients(expected, exact, grad.double())
    for got, want in zip(gradients(actual, tried, grad), wanted, strict=True):
        assert got.dtype == dtype
        assert_close(got, want)


def test_gradcheck_opcheck_and_strides() -> None:
    *values, relation, graph = make(9, 2)
    inputs = leaves(values)
    assert torch.autograd.gradcheck(lambda u, i: relation_gate(u, i, relation, graph), inputs)
    ops = torch.ops.dragkit
    ordered = *row_order(relation, 5), *row_order(graph, 3)
    for orders in ((None,) * 4, ordered):
        pairs = (relation, graph, *orders)
        torch.library.opcheck(ops.relation_gate_fwd.default, (*inputs, *pairs, False))
        out = ops.relation_gate_fwd(*values, *pairs, False)
        for mask in ([True, True], [False, True], [True, False]):
            torch.library.opcheck(
                ops.relation_gate_bwd.default,
                (torch.randn_like(out), out, *values, *pairs, mask, False),
            )
    roomy = leaves([strided_like(x) for x in values])
    relation_gate(*roomy, relation, graph).sum().backward()
    relation_gate(*inputs, relation, graph).sum().backward()
    for x, y in zip(inputs, roomy, strict=True):
        assert_close(y.grad, x.grad)


def test_second_derivatives_are_refused_and_unwanted_gradients_empty() -> None:
    *values, relation, graph = make(9, 2)
    inputs = leaves(values)
    loss = relation_gate(*inputs, relation, graph).pow(2).sum()
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="relation_gate_bwd has no derivative"):
        sum(g.sum() for g in first).backward()
    inputs[1].requires_grad_(False)
    relation_gate(*inputs, relation, graph).sum().backward()
    assert inputs[0].grad is not None and inputs[1].grad is None


def test_low_precision_sums_do_not_stall() -> None:
    """A relation in many pairs: adding ones in bfloat16 stops at 256."""
    ones = leaves([torch.ones(2, 1, 1).bfloat16(), torch.ones(1, 1, 1).bfloat16()])
    rows = torch.zeros(2000).int()
    relation_gate(*ones, rows, rows).sum().backward()
    assert_close(ones[0].grad, torch.full((2, 1, 1), 2000.0))
    assert_close(ones[1].grad, torch.full((1, 1, 1), 4000.0))


def test_wrong_arguments() -> None:
    u, i, relation, graph = make(4, 2)
    with pytest.raises(ValueError, match=r"relation must have shape \[2, \*, 7\], got \[5, 7\]"):
        relation_gate(u[0], i, relation, graph)
    with pytest.raises(ValueError, match="pair_graph must be int32"):
        relation_gate(u, i, relation, graph.long())
    with pytest.raises(ValueError, match="at least one instruction"):
        relation_gate(u, i[:, :0], relation, graph)
    order = row_order(relation, 5)
    with pytest.raises(ValueError, match=r"relation_order.ptr must have shape \[6\], got \[5\]"):
        relation_gate(u, i, relation, graph, relation_order=order._replace(ptr=order.ptr[1:]))
    with pytest.raises(ValueError, match=r"graph_order.place must have shape \[4\], got \[3\]"):
        relation_gate(u, i, relation, graph, graph_order=row_order(graph[1:], 3))
    with pytest.raises(ValueError, match="relation_order.place must be int32"):
        wide = order._replace(place=order.place.long())
        relation_gate(u, i, relation, graph, relation_order=wide)
