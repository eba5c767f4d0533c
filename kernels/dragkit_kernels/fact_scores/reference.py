"""fact_scores by its formula: plain PyTorch, differentiable."""

from __future__ import annotations

from torch import Tensor

from ..checks import accumulator_dtype
from ..orders import FactGroups, FactIndex


def fact_scores_ref(
    head_score: Tensor,
    pair_score: Tensor,
    tail_score: Tensor,
    bias: Tensor,
    *,
    fact_index: FactIndex,
    groups: FactGroups | None = None,
) -> Tensor:
    """l_e = a[head_q] + b[pair_q] + c[tail_q] + bias with q = row_e, in float32 or float64."""
    dtype = accumulator_dtype(head_score, pair_score, tail_score, bias)
    score = (
        head_score.to(dtype).index_select(0, fact_index.head)
        + pair_score.to(dtype).index_select(0, fact_index.fact_pair)
        + tail_score.to(dtype).index_select(0, fact_index.tail)
        + bias.to(dtype)
    )
    return score if groups is None else score.index_select(0, groups.row)
