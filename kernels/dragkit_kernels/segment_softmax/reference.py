"""segment_softmax by its formula: plain PyTorch, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulator_dtype
from ..segments import segment_ids


def segment_softmax_ref(score: Tensor, ptr: Tensor, count: Tensor | None = None) -> Tensor:
    """p_v = exp(s_v - max) / sum_u n_u exp(s_u - max), u over the nodes of v's graph."""
    s = score.to(accumulator_dtype(score))
    num_segments = ptr.shape[0]  # the graphs, and one more for the rows of padding
    segment = segment_ids(ptr, s.shape[0])
    s = s.masked_fill(segment == num_segments - 1, float("-inf"))
    # Start from the lowest number, not from -inf: -inf - -inf would be NaN.
    max_score = s.new_full((num_segments,), torch.finfo(s.dtype).min)
    max_score = max_score.scatter_reduce(0, segment, s.detach(), "amax")
    weight = (s - max_score.index_select(0, segment)).exp()
    counted = weight if count is None else weight * count
    total = s.new_zeros(num_segments).index_add(0, segment, counted)
    total = torch.where(total > 0, total, 1.0)  # all scores are -inf
    return weight / total.index_select(0, segment)
