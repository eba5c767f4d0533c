"""Segment softmax against one softmax per graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dragkit_kernels import segment_softmax, segment_softmax_ref
from dragkit_kernels.testing import (
    Adjacency,
    assert_close,
    fenced_allocations,
    random,
    strided_like,
)

# The interpreter also computes masked elements, and NumPy warns about them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SIZES = [[], [0], [0, 1, 5, 0, 31, 32, 33, 0], [1023, 1024, 1025], [2500, 3]]


def offsets(*sizes: int) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).int()


def loop_softmax(score: Tensor, ptr: Tensor) -> Tensor:
    bounds = zip(ptr[:-1].tolist(), ptr[1:].tolist(), strict=True)
    return torch.cat([torch.softmax(score[begin:end], 0) for begin, end in bounds])


def repeated_softmax(score: Tensor, ptr: Tensor, count: Tensor) -> Tensor:
    """Repeats every row `count` times, and returns the probability of its first copy."""
    rows = torch.arange(score.shape[0]).repeat_interleave(count)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), count.cumsum(0)])
    return loop_softmax(score[rows], ends[ptr.long()].int())[ends[:-1]]


@pytest.mark.parametrize("function", [segment_softmax, segment_softmax_ref])
@pytest.mark.parametrize("counted", [False, True], ids=["plain", "counted"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_matches_one_softmax_per_graph(
    pack: Adjacency, dtype: torch.dtype, counted: bool, function: object
) -> None:
    # Small scores, because a gradient that cancels to almost zero has no relative precision.
    score = torch.randn(pack.fact_index.num_nodes).to(dtype)
    tried, exact = score.clone().requires_grad_(), score.double().requires_grad_()
    count = pack.node_count if counted else torch.ones_like(pack.node_count)
    actual = function(tried, pack.node_ptr, count=count if counted else None)
    expected = repeated_softmax(exact, pack.node_ptr, count)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(actual, expected)
    grad = torch.randn(score.shape)
    (got,) = torch.autograd.grad(actual, tried, grad.to(actual.dtype))
    (want,) = torch.autograd.grad(expected, exact, grad.double())
    assert got.dtype == dtype
    assert_close(got, want)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matches_the_reference(
    backend: str, device: torch.device, dtype: torch.dtype, sizes: list[int]
) -> None:
    """The cases include padding, strided scores and an expanded gradient."""
    rows, ptr = sum(sizes) + 40, offsets(*sizes).to(device)
    score = (2 * random(rows)).to(device, dtype)
    generator = torch.Generator().manual_seed(rows)
    drawn = torch.randint(1, 4, (rows,), generator=generator).int().to(device)
    one = torch.ones((), device=device)
    for count, x, grad in (
        (None, score, random(rows, seed=1).to(device)),
        (drawn, strided_like(score), strided_like(random(rows, seed=1).to(device))),
        (strided_like(drawn), score, one.expand(rows)),
    ):
        tried, exact = x.detach().requires_grad_(), x.double().requires_grad_()
        expected = segment_softmax_ref(exact, ptr, count)
        with fenced_allocations():
            actual = segment_softmax(tried, ptr, count=count, backend=backend)
            (got,) = torch.autograd.grad(actual, tried, grad)
        assert actual.dtype == torch.float32 and got.dtype == dtype
        assert_close(actual, expected, tolerance=2e-6)
        (want,) = torch.autograd.grad(expected, exact, grad.double())
        # An expanded gradient cancels to zero where every count is one, so an RMS has no scale.
        torch.testing.assert_close(got.double(), want, rtol=8e-3, atol=2e-6)
        if grad.stride() != (0,):
            assert_close(got, want)
        assert not actual[rows - 40 :].any() and not got[rows - 40 :].any()


def test_extreme_scores(backend: str, device: torch.device) -> None:
    inf = float("inf")
    score = torch.tensor([1e4, 1e4, -1e4, 3e38, -3e38, -inf, -inf, 2.0], device=device)
    ptr = offsets(3, 2, 2, 1).to(device)
    score.requires_grad_()
    p = segment_softmax(score, ptr, backend=backend)
    assert p.tolist() == [0.5, 0.5, 0, 1, 0, 0, 0, 1]
    (grad,) = torch.autograd.grad(p, score, torch.arange(8.0, device=device))
    assert torch.isfinite(grad).all()
    score.data[1] = float("nan")
    p = segment_softmax(score, ptr, backend=backend)
    assert p[:3].isnan().all() and p[3:].tolist() == [1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("score", "ptr", "count", "message"),
    [
        (torch.zeros(3, 1), offsets(3), None, r"score must have shape"),
        (torch.zeros(3), offsets(3).long(), None, "ptr must be int32"),
        (torch.zeros(3), offsets(3), torch.ones(2).int(), r"count must have shape"),
        (torch.zeros(3), offsets(3), torch.ones(3), "count must be int32"),
        (torch.zeros(3).long(), offsets(3), None, "floating point"),
    ],
)
def test_wrong_arguments(score: Tensor, ptr: Tensor, count: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segment_softmax(score, ptr, count=count)
