"""Segment softmax against one softmax per graph."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dragkit_kernels import segment_softmax, segment_softmax_ref
from dragkit_kernels.testing import Adjacency, assert_close, strided_like


def loop_softmax(score: Tensor, ptr: Tensor, mask: Tensor | None) -> Tensor:
    pieces = []
    for begin, end in zip(ptr[:-1].tolist(), ptr[1:].tolist(), strict=True):
        live = [v for v in range(begin, end) if mask is None or bool(mask[v])]
        row = torch.zeros(end - begin, dtype=score.dtype)
        if live:
            row[torch.tensor(live) - begin] = torch.softmax(score[live], 0)
        pieces.append(row)
    return torch.cat(pieces)


def repeated_softmax(score: Tensor, ptr: Tensor, count: Tensor) -> Tensor:
    """Every row written out as often as it counts, and the share of its first copy."""
    rows = torch.arange(score.shape[0]).repeat_interleave(count)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), count.cumsum(0)])
    first = ends[:-1]
    return loop_softmax(score[rows], ends[ptr.long()].int(), None)[first]


def masks(count: int) -> list[Tensor | None]:
    drawn = torch.rand(count) > 0.4
    return [None, drawn, torch.zeros(count, dtype=torch.bool)]


@pytest.mark.parametrize("function", [segment_softmax, segment_softmax_ref])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_matches_one_softmax_per_graph(
    pack: Adjacency, dtype: torch.dtype, function: object
) -> None:
    count = pack.orders.num_nodes
    # Mild scores: a gradient that cancels to almost nothing has no relative precision to test.
    score = torch.randn(count).to(dtype)
    for mask in masks(count):
        tried, exact = score.clone().requires_grad_(), score.double().requires_grad_()
        actual = function(tried, pack.node_ptr, mask)
        expected = loop_softmax(exact, pack.node_ptr, mask)
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(actual, expected)
        grad = torch.randn(count)
        (got,) = torch.autograd.grad(actual, tried, grad.to(actual.dtype))
        assert got.dtype == dtype
        if expected.requires_grad:
            (want,) = torch.autograd.grad(expected, exact, grad.double())
            assert_close(got, want)
        else:
            assert not got.any()


@pytest.mark.parametrize("function", [segment_softmax, segment_softmax_ref])
def test_a_counted_row_stands_for_equal_ones(pack: Adjacency, function: object) -> None:
    score = torch.randn(pack.orders.num_nodes, dtype=torch.float64)
    tried, exact = score.clone().requires_grad_(), score.clone().requires_grad_()
    actual = function(tried, pack.node_ptr, None, count=pack.node_count)
    expected = repeated_softmax(exact, pack.node_ptr, pack.node_count)
    assert_close(actual, expected)
    if score.numel():
        grad = torch.randn_like(score)
        (got,) = torch.autograd.grad(actual, tried, grad)
        (want,) = torch.autograd.grad(expected, exact, grad)
        assert_close(got, want)
    low = score.bfloat16()
    got = function(low, pack.node_ptr, None, count=pack.node_count)
    assert_close(got, repeated_softmax(low.double(), pack.node_ptr, pack.node_count))


def test_masked_nodes_get_no_probability_and_no_gradient() -> None:
    score = torch.tensor([1.0, float("inf"), 2.0, float("nan")], requires_grad=True)
    mask = torch.tensor([True, False, True, False])
    p = segment_softmax(score, torch.tensor([0, 4], dtype=torch.int32), mask)
    assert_close(p, torch.tensor([0.2689414, 0.0, 0.7310586, 0.0]))
    (grad,) = torch.autograd.grad(p, score, torch.tensor([1.0, 5.0, 0.0, 7.0]))
    assert grad[1] == 0 and grad[3] == 0
    assert_close(grad, torch.tensor([0.1966119, 0.0, -0.1966119, 0.0]))


def test_large_scores_do_not_overflow() -> None:
    score = torch.tensor([1e4, 1e4, -1e4, 3e38, -3e38], requires_grad=True)
    p = segment_softmax(score, torch.tensor([0, 3, 5], dtype=torch.int32))
    assert p.tolist() == [0.5, 0.5, 0.0, 1.0, 0.0]
    (grad,) = torch.autograd.grad(p, score, torch.arange(5.0))
    assert torch.isfinite(grad).all()


def test_rows_after_the_last_graph_are_zero() -> None:
    score = torch.randn(6, requires_grad=True)
    p = segment_softmax(score, torch.tensor([0, 2, 4], dtype=torch.int32))
    assert p[4:].tolist() == [0.0, 0.0]
    (grad,) = torch.autograd.grad(p, score, torch.ones(6))
    assert grad[4:].tolist() == [0.0, 0.0]


def test_gradcheck() -> None:
    ptr = torch.tensor([0, 0, 3, 7, 7], dtype=torch.int32)
    mask = torch.tensor([True, False, True, True, True, True, False])
    score = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: segment_softmax(s, ptr, mask), (score,))


def test_strided_score_and_expanded_gradient() -> None:
    ptr = torch.tensor([0, 3, 7], dtype=torch.int32)
    score = torch.randn(7)
    roomy = strided_like(score).requires_grad_()
    p = segment_softmax(roomy, ptr)
    assert torch.equal(p, segment_softmax(score, ptr))
    p.sum().backward()
    assert roomy.grad.abs().max() < 1e-6


def test_two_runs_are_bit_equal() -> None:
    ptr = torch.tensor([0, 900, 2000], dtype=torch.int32)
    score = torch.randn(2000, requires_grad=True)
    grad = torch.randn(2000)
    runs = []
    for _ in range(2):
        p = segment_softmax(score, ptr)
        runs.append((p, *torch.autograd.grad(p, score, grad)))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_every_nonempty_graph_sums_to_one(sizes: list[int], seed: int) -> None:
    ptr = torch.tensor([0, *sizes]).cumsum(0).int()
    score = 10 * torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed))
    p = segment_softmax(score, ptr)
    for size, piece in zip(sizes, p.split(sizes), strict=True):
        assert abs(float(piece.sum()) - (size > 0)) < 1e-5


@pytest.mark.parametrize(
    ("score", "ptr", "mask", "message"),
    [
        (torch.zeros(3, 1), torch.zeros(2, dtype=torch.int32), None, r"score must have shape"),
        (torch.zeros(3), torch.zeros(2, dtype=torch.int64), None, "ptr must be int32"),
        (torch.zeros(3), torch.zeros(2, dtype=torch.int32), torch.ones(2).bool(), r"mask must"),
        (torch.zeros(3), torch.zeros(2, dtype=torch.int32), torch.ones(3), "mask must be bool"),
        (torch.zeros(3).long(), torch.zeros(2, dtype=torch.int32), None, "floating point"),
    ],
)
def test_wrong_arguments(score: Tensor, ptr: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segment_softmax(score, ptr, mask)
