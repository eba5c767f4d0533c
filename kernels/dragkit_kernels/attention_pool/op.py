"""dragkit::attention_pool_fwd and _bwd: the states of a segment are read where they lie.

Gathering them first would copy the largest tensor of a step, once forward and once for every use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..library import forbid_double_backward, register, register_gradient
from ..segments import bag_sum, ordered_sum, row_dots, segment_ids


def attention_pool_fwd(
    states: Tensor, query: Tensor, rows: Tensor, ptr: Tensor
) -> tuple[Tensor, Tensor]:
    """The pooled states [G, D] and the attention [S]; see attention_pool."""
    nothing = torch.zeros_like(rows)
    score = row_dots(states, rows, query.unsqueeze(0), nothing)
    segment = segment_ids(ptr, rows.shape[0])
    top = score.new_full(ptr.shape, torch.finfo(score.dtype).min)
    top = top.scatter_reduce_(0, segment, score, "amax")
    weight = score.sub_(top.index_select(0, segment)).exp_()
    order = torch.arange(rows.shape[0], dtype=rows.dtype, device=rows.device)
    attention = weight.div_(ordered_sum(weight, order, ptr).index_select(0, segment))
    return bag_sum(states, rows, ptr, attention), attention


def attention_pool_bwd(
    grad: Tensor, attention: Tensor, states: Tensor, rows: Tensor, ptr: Tensor
) -> Tensor:
    """dquery = sum_i ds_i states[rows_i] with ds_i = a_i (da_i - sum_j a_j da_j) over a segment and
    da_i = <d_g, states[rows_i]>."""
    count = rows.shape[0]
    segment = segment_ids(ptr, count).to(rows.dtype)
    d_attention = row_dots(states, rows, grad.contiguous(), segment)
    order = torch.arange(count, dtype=rows.dtype, device=rows.device)
    weighted = attention * d_attention
    inner = ordered_sum(weighted, order, ptr)
    d_score = weighted.addcmul_(attention, inner.index_select(0, segment), value=-1)
    whole = torch.stack([ptr[0], ptr[-1]])
    return bag_sum(states, rows, whole, d_score).squeeze(0)


def _attention_pool_fake(
    states: Tensor, query: Tensor, rows: Tensor, ptr: Tensor
) -> tuple[Tensor, Tensor]:
    return states.new_empty(ptr.shape[0] - 1, states.shape[1]), states.new_empty(rows.shape)


def _attention_pool_bwd_fake(
    grad: Tensor, attention: Tensor, states: Tensor, rows: Tensor, ptr: Tensor
) -> Tensor:
    return states.new_empty(states.shape[1])


def _setup(ctx: object, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    states, _, rows, ptr = inputs
    ctx.save_for_backward(output[1], states, rows, ptr)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: object, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor]:
    return None, torch.ops.dragkit.attention_pool_bwd(grad, *ctx.saved_tensors)


register(
    "attention_pool_fwd(Tensor states, Tensor query, Tensor rows, Tensor ptr) -> (Tensor, Tensor)",
    attention_pool_fwd,
    _attention_pool_fake,
)
register(
    "attention_pool_bwd(Tensor grad, Tensor attention, Tensor states, Tensor rows, Tensor ptr) "
    "-> Tensor",
    attention_pool_bwd,
    _attention_pool_bwd_fake,
)
register_gradient("attention_pool_fwd", _backward, _setup)
forbid_double_backward("attention_pool_bwd")
