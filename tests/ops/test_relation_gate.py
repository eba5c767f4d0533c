"""Gated relation rows against a loop over pairs."""

from __future__ import annotations

import pytest
import torch

from dragkit_kernels import relation_gate, relation_gate_ref
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
    # The sums over pairs run in the inputs' own precision.
    limit = {torch.bfloat16: 2e-2}.get(dtype)
    wanted = gradients(expected, exact, grad.double())
    for got, want in zip(gradients(actual, tried, grad), wanted, strict=True):
        assert got.dtype == dtype
        assert_close(got, want, tolerance=limit)


def test_gradcheck_opcheck_and_strides() -> None:
    *values, relation, graph = make(9, 2)
    inputs = leaves(values)
    assert torch.autograd.gradcheck(lambda u, i: relation_gate(u, i, relation, graph), inputs)
    ops = torch.ops.dragkit
    torch.library.opcheck(ops.relation_gate_fwd.default, (*inputs, relation, graph))
    out = ops.relation_gate_fwd(*values, relation, graph)
    torch.library.opcheck(
        ops.relation_gate_bwd.default, (torch.randn_like(out), out, *values, relation, graph)
    )
    roomy = leaves([strided_like(x) for x in values])
    relation_gate(*roomy, relation, graph).sum().backward()
    relation_gate(*inputs, relation, graph).sum().backward()
    for x, y in zip(inputs, roomy, strict=True):
        assert_close(y.grad, x.grad)


def test_wrong_arguments() -> None:
    u, i, relation, graph = make(4, 2)
    with pytest.raises(ValueError, match=r"relation must have shape \[2, \*, 7\], got \[5, 7\]"):
        relation_gate(u[0], i, relation, graph)
    with pytest.raises(ValueError, match="pair_graph must be int32"):
        relation_gate(u, i, relation, graph.long())
    with pytest.raises(ValueError, match="at least one instruction"):
        relation_gate(u, i[:, :0], relation, graph)
