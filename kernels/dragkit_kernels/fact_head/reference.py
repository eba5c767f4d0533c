"""Fact scores by their formula: plain PyTorch, differentiable."""

from __future__ import annotations

from torch import Tensor

from ..checks import accumulator_dtype
from ..orders import FactOrders


def fact_scores_ref(
    head_score: Tensor,
    pair_score: Tensor,
    tail_score: Tensor,
    bias: Tensor,
    *,
    orders: FactOrders,
) -> Tensor:
    """l_e = a[head_e] + b[pair_e] + c[tail_e] + bias, summed in float32 or float64."""
    dtype = accumulator_dtype(head_score, pair_score, tail_score, bias)
    return (
        head_score.to(dtype).index_select(0, orders.head)
        + pair_score.to(dtype).index_select(0, orders.fact_pair)
        + tail_score.to(dtype).index_select(0, orders.tail)
        + bias.to(dtype)
    )
