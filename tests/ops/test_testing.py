"""The helpers of dragkit_kernels.testing."""

from __future__ import annotations

import pytest
import torch

from dragkit_kernels.testing import assert_close, random_adjacency, strided_like


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (torch.ones(3), torch.ones(4)),
        (torch.tensor([1.0, 2.0, 3.001]), torch.tensor([1.0, 2.0, 3.0])),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])),
        (torch.tensor([1.0, 0.0]), torch.tensor([1.0, float("nan")])),
        (torch.tensor([1.0, float("inf")]), torch.tensor([1.0, -float("inf")])),
        (torch.full((3,), 1e-3), torch.zeros(3)),
    ],
)
def test_assert_close_refuses(actual: torch.Tensor, expected: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        assert_close(actual, expected)


def test_assert_close_accepts_the_dtype_s_rounding() -> None:
    exact = torch.randn(1000, dtype=torch.float64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert_close(exact.to(dtype), exact)
    assert_close(torch.zeros(0), torch.zeros(0))
    assert_close(torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]))


def test_random_adjacency_keeps_facts_inside_their_graph() -> None:
    pack = random_adjacency([(0, 0), (5, 40), (3, 9)], 2, seed=3)
    for end in (pack.fact_index.head, pack.fact_index.tail):
        assert torch.equal(pack.node_graph[end], pack.fact_graph)
    assert pack.fact_ptr.tolist() == [0, 0, 40, 49] and pack.node_ptr.tolist() == [0, 0, 5, 8]


def test_strided_like() -> None:
    x = torch.randn(4, 5)
    y = strided_like(x)
    assert torch.equal(x, y) and not y.is_contiguous() and y.stride(1) == 2
