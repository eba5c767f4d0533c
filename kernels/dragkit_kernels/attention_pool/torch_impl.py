"""attention_pool in PyTorch, reading the states of a segment where they are.

Gathering them first would copy the largest tensor of a step, once in the forward and again in every
product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..segments import bag_sum, ordered_sum, row_dots, segment_ids


def attention_pool_fwd(
    states: Tensor, query: Tensor, rows: Tensor, ptr: Tensor
) -> tuple[Tensor, Tensor]:
    """The pooled states [G, D] and the attention [S] (see `attention_pool`)."""
    score = row_dots(states, rows, query.unsqueeze(0), torch.zeros_like(rows))
    segment = segment_ids(ptr, rows.shape[0])
    max_score = score.new_full(ptr.shape, torch.finfo(score.dtype).min)
    max_score = max_score.scatter_reduce_(0, segment, score, "amax")
    weight = score.sub_(max_score.index_select(0, segment)).exp_()
    perm = torch.arange(rows.shape[0], dtype=rows.dtype, device=rows.device)
    attention = weight.div_(ordered_sum(weight, perm, ptr).index_select(0, segment))
    return bag_sum(states, rows, ptr, attention), attention


def attention_pool_bwd(
    grad: Tensor, attention: Tensor, states: Tensor, rows: Tensor, ptr: Tensor
) -> Tensor:
    """dquery = sum_i ds_i states[rows_i] with da_i = <grad[segment_i], states[rows_i]> and
    ds_i = a_i (da_i - sum_j a_j da_j), the sum over the j of i's segment."""
    num_rows = rows.shape[0]
    segment = segment_ids(ptr, num_rows).to(rows.dtype)
    d_attention = row_dots(states, rows, grad.contiguous(), segment)
    perm = torch.arange(num_rows, dtype=rows.dtype, device=rows.device)
    weighted = attention * d_attention
    total = ordered_sum(weighted, perm, ptr)
    d_score = weighted.addcmul_(attention, total.index_select(0, segment), value=-1)
    # One bag of all rows: the query has a single gradient.
    all_rows = torch.stack([ptr[0], ptr[-1]])
    return bag_sum(states, rows, all_rows, d_score).squeeze(0)
