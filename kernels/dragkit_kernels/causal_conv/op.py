"""Registration of dragkit::causal_conv_fwd and _bwd, which save only the inputs."""

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
    from .backward import causal_conv_bwd
    from .forward import causal_conv_fwd
else:
    causal_conv_bwd = causal_conv_fwd = None


def _causal_conv_fake(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


def _causal_conv_bwd_fake(grad: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    return empty_gradients(arguments[:3], arguments[-2])


def _setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    x, weight, bias, seq_pos, ctx.triton = inputs
    ctx.save_for_backward(x, weight, bias, seq_pos)


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor, ...]:
    mask = list(ctx.needs_input_grad[:3])
    return torch.ops.dragkit.causal_conv_bwd(grad, *ctx.saved_tensors, mask, ctx.triton)


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor seq_pos"
register(
    f"causal_conv_fwd({_INPUTS}, bool triton) -> Tensor",
    torch_impl.causal_conv_fwd,
    _causal_conv_fake,
    triton=causal_conv_fwd,
)
register(
    f"causal_conv_bwd(Tensor grad, {_INPUTS}, bool[] output_mask, bool triton) "
    "-> (Tensor, Tensor, Tensor)",
    torch_impl.causal_conv_bwd,
    _causal_conv_bwd_fake,
    triton=causal_conv_bwd,
)
register_gradient("causal_conv_fwd", _backward, _setup)
forbid_double_backward("causal_conv_bwd")
