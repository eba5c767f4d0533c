"""Registration of dragkit::gated_rms_norm_fwd and _bwd, which save only the inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import HAS_TRITON
from ..library import (
    empty_gradients,
    forbid_double_backward,
    register,
    register_gradient,
)
from . import torch_impl

if HAS_TRITON:
    from .backward import gated_rms_norm_bwd
    from .forward import gated_rms_norm_fwd
else:
    gated_rms_norm_bwd = gated_rms_norm_fwd = None


def _gated_rms_norm_fake(y: Tensor, *rest: object) -> Tensor:
    return y.new_empty(y.shape)


def _gated_rms_norm_bwd_fake(grad: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    return empty_gradients(arguments[:3], arguments[-2])


def _setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    y, gate, weight, ctx.groups, ctx.eps, ctx.triton = inputs
    ctx.save_for_backward(y, gate, weight)


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor, ...]:
    mask = list(ctx.needs_input_grad[:3])
    return torch.ops.dragkit.gated_rms_norm_bwd(
        grad, *ctx.saved_tensors, ctx.groups, ctx.eps, mask, ctx.triton
    )


register(
    "gated_rms_norm_fwd(Tensor y, Tensor? gate, Tensor weight, SymInt groups, float eps, "
    "bool triton) -> Tensor",
    torch_impl.gated_rms_norm_fwd,
    _gated_rms_norm_fake,
    triton=gated_rms_norm_fwd,
)
register(
    "gated_rms_norm_bwd(Tensor grad, Tensor y, Tensor? gate, Tensor weight, SymInt groups, "
    "float eps, bool[] output_mask, bool triton) -> (Tensor, Tensor, Tensor)",
    torch_impl.gated_rms_norm_bwd,
    _gated_rms_norm_bwd_fake,
    triton=gated_rms_norm_bwd,
)
register_gradient("gated_rms_norm_fwd", _backward, _setup)
forbid_double_backward("gated_rms_norm_bwd")
