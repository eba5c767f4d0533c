"""dragkit::segment_softmax_fwd and _bwd: opaque ops whose backward needs only the output."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import HAS_TRITON
from ..library import forbid_double_backward, register, register_gradient
from ..segments import segment_ids
from .reference import segment_softmax_ref

if HAS_TRITON:
    from .backward import segment_softmax_bwd
    from .forward import segment_softmax_fwd
else:
    segment_softmax_bwd = segment_softmax_fwd = None


def _torch_bwd(grad: Tensor, p: Tensor, ptr: Tensor, count: Tensor | None) -> Tensor:
    """ds_v = p_v (dp_v - n_v sum_u p_u dp_u), the sum over v's graph."""
    segment = segment_ids(ptr, p.shape[0])
    weighted = p * grad
    total = p.new_zeros(ptr.shape[0]).index_add_(0, segment, weighted)
    mass = p if count is None else p * count
    return weighted.addcmul_(mass, total.index_select(0, segment), value=-1)


def _segment_softmax_fake(score: Tensor, ptr: Tensor, count: Tensor | None, triton: bool) -> Tensor:
    dtype = torch.float64 if score.dtype == torch.float64 else torch.float32
    return score.new_empty(score.shape, dtype=dtype)


def _segment_softmax_bwd_fake(grad: Tensor, p: Tensor, *rest: object) -> Tensor:
    return p.new_empty(p.shape)


def _setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    score, ptr, count, ctx.triton = inputs
    ctx.save_for_backward(output, ptr, count)
    ctx.score_dtype = score.dtype


def _backward(ctx: object, grad: Tensor) -> Tensor:
    ds = torch.ops.dragkit.segment_softmax_bwd(grad, *ctx.saved_tensors, ctx.triton)
    return ds.to(ctx.score_dtype)


register(
    "segment_softmax_fwd(Tensor score, Tensor ptr, Tensor? count, bool triton) -> Tensor",
    segment_softmax_ref,
    _segment_softmax_fake,
    triton=segment_softmax_fwd,
)
register(
    "segment_softmax_bwd(Tensor grad, Tensor p, Tensor ptr, Tensor? count, bool triton) -> Tensor",
    _torch_bwd,
    _segment_softmax_bwd_fake,
    triton=segment_softmax_bwd,
)
register_gradient("segment_softmax_fwd", _backward, _setup)
forbid_double_backward("segment_softmax_bwd")
