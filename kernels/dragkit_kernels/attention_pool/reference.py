"""attention_pool by its formula: plain PyTorch, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from ..segments import segment_ids


def attention_pool_ref(states: Tensor, query: Tensor, rows: Tensor, ptr: Tensor) -> Tensor:
    """o_g = sum_i a_i states[rows_i] with a = softmax of <states[rows_i], query> over segment g."""
    values = states.index_select(0, rows)
    segment, num_segments = segment_ids(ptr, rows.shape[0]), ptr.shape[0]
    score = values @ query
    max_score = score.new_full((num_segments,), torch.finfo(score.dtype).min)
    max_score = max_score.scatter_reduce(0, segment, score.detach(), "amax")
    weight = (score - max_score.index_select(0, segment)).exp()
    total = weight.new_zeros(num_segments).index_add(0, segment, weight)
    attention = (weight / total.index_select(0, segment)).unsqueeze(1)
    out = values.new_zeros(num_segments, values.shape[1])
    return out.index_add(0, segment, attention * values)[:-1]
