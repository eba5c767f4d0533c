"""The kernels of segment_softmax against the reference, with gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dragkit_kernels import segment_softmax, segment_softmax_ref
from dragkit_kernels.testing import assert_close, fenced_allocations, strided_like

# The interpreter computes masked elements too.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SIZES = [[], [0], [0, 1, 5, 0, 31, 32, 33, 0], [1023, 1024, 1025], [2500, 3]]


def softmax(score: Tensor, ptr: Tensor, mask: Tensor | None, count: Tensor | None) -> Tensor:
    return segment_softmax(score, ptr, mask, count=count, backend="triton")


def check(score: Tensor, ptr: Tensor, mask: Tensor | None, count: Tensor | None) -> Tensor:
    tried, exact = score.detach().requires_grad_(), score.double().requires_grad_()
    expected = segment_softmax_ref(exact, ptr, mask, count)
    grad = torch.randn(score.shape, generator=torch.Generator().manual_seed(1)).to(score.device)
    with fenced_allocations():
        actual = softmax(tried, ptr, mask, count)
        (got,) = torch.autograd.grad(actual, tried, strided_like(grad))
    assert actual.dtype == torch.float32 and got.dtype == score.dtype
    assert_close(actual, expected, tolerance=2e-6)
    assert_close(got, torch.autograd.grad(expected, exact, grad.double())[0])
    return actual


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matches_the_reference(device: torch.device, dtype: torch.dtype, sizes: list[int]) -> None:
    ptr = torch.tensor([0, *sizes]).cumsum(0).int().to(device)
    rows = sum(sizes) + 40  # rows of padding
    generator = torch.Generator().manual_seed(rows)
    score = (2 * torch.randn(rows, generator=generator)).to(device, dtype)
    drawn = (torch.rand(rows, generator=generator) > 0.4).to(device)
    count = torch.randint(1, 4, (rows,), generator=generator).int().to(device)
    for mask, times in ((None, None), (drawn, None), (None, count), (drawn, count)):
        p = check(score, ptr, mask, times)
        assert not p[rows - 40 :].any()
    p = check(strided_like(score), ptr, torch.zeros_like(drawn), count)
    assert not p.any()


def test_extreme_scores(device: torch.device) -> None:
    inf = float("inf")
    score = torch.tensor([1e4, 1e4, -1e4, 3e38, -3e38, -inf, -inf, 2.0, inf], device=device)
    ptr = torch.tensor([0, 3, 5, 7, 9], dtype=torch.int32, device=device)
    mask = torch.ones(9, dtype=torch.bool, device=device)
    mask[8] = False
    assert softmax(score, ptr, mask, None).tolist() == [0.5, 0.5, 0, 1, 0, 0, 0, 1, 0]
    score[1] = float("nan")
    p = softmax(score, ptr, mask, None)
    assert p[:3].isnan().all() and p[3:].tolist() == [1, 0, 0, 0, 1, 0]


def test_two_runs_are_bit_equal(device: torch.device) -> None:
    ptr = torch.tensor([0, 1900, 2000], dtype=torch.int32, device=device)
    score = torch.randn(2000, device=device, requires_grad=True)
    grad = torch.randn(2000, device=device)
    runs = []
    for _ in range(2):
        p = softmax(score, ptr, None, None)
        runs.append((p, *torch.autograd.grad(p, score, grad)))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
