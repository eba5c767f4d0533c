"""dragkit::segment_softmax_fwd and _bwd. The backward reads only the output, not the scores."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import HAS_TRITON
from ..checks import accumulator_dtype
from ..library import forbid_double_backward, register, register_gradient
from . import torch_impl
from .reference import segment_softmax_ref

if HAS_TRITON:
    from .backward import segment_softmax_bwd
    from .forward import segment_softmax_fwd
else:
    segment_softmax_bwd = segment_softmax_fwd = None


def _fwd_fake(score: Tensor, ptr: Tensor, count: Tensor | None, triton: bool) -> Tensor:
    return score.new_empty(score.shape, dtype=accumulator_dtype(score))


def _bwd_fake(grad: Tensor, p: Tensor, *rest: object) -> Tensor:
    return p.new_empty(p.shape)


def _setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    score, ptr, count, ctx.triton = inputs
    ctx.save_for_backward(output, ptr, count)
    ctx.score_dtype = score.dtype


def _backward(ctx: object, grad: Tensor) -> Tensor:
    d_score = torch.ops.dragkit.segment_softmax_bwd(grad, *ctx.saved_tensors, ctx.triton)
    return d_score.to(ctx.score_dtype)


register(
    "segment_softmax_fwd(Tensor score, Tensor ptr, Tensor? count, bool triton) -> Tensor",
    segment_softmax_ref,
    _fwd_fake,
    triton=segment_softmax_fwd,
)
register(
    "segment_softmax_bwd(Tensor grad, Tensor p, Tensor ptr, Tensor? count, bool triton) -> Tensor",
    torch_impl.segment_softmax_bwd,
    _bwd_fake,
    triton=segment_softmax_bwd,
)
register_gradient("segment_softmax_fwd", _backward, _setup)
forbid_double_backward("segment_softmax_bwd")
