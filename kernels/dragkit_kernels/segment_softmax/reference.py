"""Softmax within every graph by its formula: plain PyTorch, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulator_dtype
from ..segments import segment_ids


def segment_softmax_ref(score: Tensor, ptr: Tensor, count: Tensor | None = None) -> Tensor:
    """p_v = exp(s_v - max) / sum_u n_u exp(s_u - max) over the u of v's graph, else 0."""
    s = score.to(accumulator_dtype(score))
    segments = ptr.shape[0]  # one more than graphs: rows after the last graph
    segment = segment_ids(ptr, s.shape[0])
    s = s.masked_fill(segment == segments - 1, float("-inf"))
    top = torch.full((segments,), torch.finfo(s.dtype).min, dtype=s.dtype, device=s.device)
    top = top.scatter_reduce(0, segment, s.detach(), "amax")
    weight = (s - top.index_select(0, segment)).exp()
    total = s.new_zeros(segments).index_add(0, segment, weight if count is None else weight * count)
    total = torch.where(total > 0, total, 1.0)  # a graph without a live node
    return weight / total.index_select(0, segment)
