"""Attention pooling against one softmax per segment."""

from __future__ import annotations

import pytest
import torch

from dragkit_kernels import attention_pool, attention_pool_ref
from dragkit_kernels.testing import assert_close

SIZES = [[3, 0, 5, 1, 0], [0, 0], [], [7]]


def make(sizes: list[int], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    rows = torch.randint(0, 11, (sum(sizes),)).int()
    ptr = torch.tensor([0, *sizes]).cumsum(0).int()
    states, query = torch.randn(11, 6).to(dtype), torch.randn(6).to(dtype).requires_grad_()
    return states, query, rows, ptr


@pytest.mark.parametrize("function", [attention_pool, attention_pool_ref])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_matches_one_softmax_per_segment(
    sizes: list[int], dtype: torch.dtype, function: object
) -> None:
    states, query, rows, ptr = make(sizes, dtype)
    exact = query.detach().double().requires_grad_()
    pooled = [torch.zeros(0, 6, dtype=torch.float64) * exact.sum()]
    for begin, end in zip(ptr[:-1].tolist(), ptr[1:].tolist(), strict=True):
        values = states[rows[begin:end].long()].double()
        pooled.append((torch.softmax(values @ exact, 0) @ values).unsqueeze(0))
    expected = torch.cat(pooled)
    actual = function(states, query, rows, ptr)
    assert actual.dtype == dtype
    assert_close(actual, expected)
    grad = torch.randn(expected.shape, dtype=torch.float64)
    (want,) = torch.autograd.grad(expected, exact, grad)
    (got,) = torch.autograd.grad(actual, query, grad.to(dtype))
    assert_close(got, want)


def test_large_scores_do_not_overflow() -> None:
    states = torch.tensor([[1e4], [-1e4], [1e4]])
    query = torch.tensor([3.0], requires_grad=True)
    rows, ptr = torch.arange(3, dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    out = attention_pool(states, query, rows, ptr)
    assert out.item() == 1e4
    out.sum().backward()
    assert torch.isfinite(query.grad).all()


def test_gradcheck_opcheck_and_compile() -> None:
    states, query, rows, ptr = make([3, 0, 5, 1])
    assert torch.autograd.gradcheck(lambda q: attention_pool(states, q, rows, ptr), (query,))
    ops = torch.ops.dragkit
    torch.library.opcheck(ops.attention_pool_fwd.default, (states, query, rows, ptr))
    out, attention = ops.attention_pool_fwd(states, query.detach(), rows, ptr)
    torch.library.opcheck(
        ops.attention_pool_bwd.default, (torch.randn_like(out), attention, states, rows, ptr)
    )


def test_wrong_arguments() -> None:
    states, query, rows, ptr = make([3, 2])
    with pytest.raises(ValueError, match=r"query must have shape \[6\], got \[5\]"):
        attention_pool(states, query[:5], rows, ptr)
    with pytest.raises(ValueError, match="both be float32 or both float64"):
        attention_pool(states.bfloat16(), query.bfloat16(), rows, ptr)
    with pytest.raises(ValueError, match="states must not require a gradient"):
        attention_pool(states.requires_grad_(), query, rows, ptr)
