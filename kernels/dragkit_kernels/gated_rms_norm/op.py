"""dragkit::gated_rms_norm_fwd and _bwd: nothing is kept but the inputs.

The PyTorch form takes a block of rows through all passes while it is in the cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import HAS_TRITON
from ..blocks import row_blocks
from ..checks import accumulator_dtype
from ..library import forbid_gradient, register, register_gradient

if HAS_TRITON:
    from .backward import gated_rms_norm_bwd
    from .forward import gated_rms_norm_fwd
else:
    gated_rms_norm_bwd = gated_rms_norm_fwd = None


def _normalised(
    y: Tensor, gate: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """z of the groups [n, G, D/G], 1 / rms(z) [n, G, 1], and silu(gate) or None."""
    activated = None if gate is None else F.silu(gate)
    z = (y if activated is None else y * activated).unflatten(1, (groups, -1))
    scale = z.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return z, scale, activated


def _torch_fwd(y: Tensor, gate: Tensor | None, weight: Tensor, groups: int, eps: float) -> Tensor:
    """See gated_rms_norm."""
    wide_weight = weight.to(_accumulator(y, gate, weight))
    out = y.new_empty(y.shape)
    for begin, end in row_blocks(y):
        part = out[begin:end]
        z, scale, _ = _normalised(*_rows(wide_weight, begin, end, y, gate), groups, eps)
        if part.dtype == z.dtype:
            torch.mul(z, scale, out=part.unflatten(1, (groups, -1)))
            part.mul_(wide_weight)
        else:
            part.copy_((z * scale).flatten(1).mul_(wide_weight))
    return out


def _torch_bwd(
    grad: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    groups: int,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dz = (g - n mean(g n)) / rms(z) with n = z / rms(z), g = grad weight; then its factors."""
    wide_weight = weight.to(_accumulator(y, gate, weight))
    d_y = y.new_empty(y.shape if output_mask[0] else 0)
    d_gate = y.new_empty(0)
    if gate is not None and output_mask[1]:
        d_gate = gate.new_empty(gate.shape)
    total = torch.zeros_like(wide_weight)
    for begin, end in row_blocks(y):
        wide_grad, wide_y, wide_gate = _rows(wide_weight, begin, end, grad, y, gate)
        z, scale, activated = _normalised(wide_y, wide_gate, groups, eps)
        normed = z * scale
        if output_mask[2]:
            total += (wide_grad * normed.flatten(1)).sum(0)
        if output_mask[0] or output_mask[1]:
            d_z = (wide_grad * wide_weight).unflatten(1, (groups, -1))
            along = (d_z * normed).mean(-1, keepdim=True)
            d_z = d_z.addcmul_(normed, along, value=-1).mul_(scale).flatten(1)
            if output_mask[1]:
                part = torch.ops.aten.silu_backward(d_z * wide_y, wide_gate)
                d_gate[begin:end] = part
            if output_mask[0]:
                d_y[begin:end] = d_z if activated is None else d_z.mul_(activated)
    return d_y, d_gate, total.to(weight.dtype) if output_mask[2] else weight.new_empty(0)


def _accumulator(y: Tensor, gate: Tensor | None, weight: Tensor) -> torch.dtype:
    return accumulator_dtype(y, weight, y if gate is None else gate)


def _rows(like: Tensor, begin: int, end: int, *tensors: Tensor | None) -> list[Tensor | None]:
    """Rows of each tensor in the dtype of `like`."""
    return [None if x is None else x[begin:end].to(like.dtype) for x in tensors]


def _gated_rms_norm_fake(y: Tensor, *rest: object) -> Tensor:
    return y.new_empty(y.shape)


def _gated_rms_norm_bwd_fake(
    grad: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    groups: int,
    eps: float,
    output_mask: list[bool],
    triton: bool,
) -> tuple[Tensor, ...]:
    return (
        y.new_empty(y.shape if output_mask[0] else 0),
        y.new_empty(0) if gate is None or not output_mask[1] else gate.new_empty(gate.shape),
        weight.new_empty(weight.shape if output_mask[2] else 0),
    )


def _setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    y, gate, weight, ctx.groups, ctx.eps, ctx.triton = inputs
    ctx.save_for_backward(y, gate, weight)


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    grads = torch.ops.dragkit.gated_rms_norm_bwd(
        grad, *ctx.saved_tensors, ctx.groups, ctx.eps, wanted, ctx.triton
    )
    return *(g if w else None for g, w in zip(grads, wanted, strict=True)), None, None, None


register(
    "gated_rms_norm_fwd(Tensor y, Tensor? gate, Tensor weight, SymInt groups, float eps, "
    "bool triton) -> Tensor",
    _torch_fwd,
    _gated_rms_norm_fake,
    triton=gated_rms_norm_fwd,
)
register(
    "gated_rms_norm_bwd(Tensor grad, Tensor y, Tensor? gate, Tensor weight, SymInt groups, "
    "float eps, bool[] output_mask, bool triton) -> (Tensor, Tensor, Tensor)",
    _torch_bwd,
    _gated_rms_norm_bwd_fake,
    triton=gated_rms_norm_bwd,
)
register_gradient("gated_rms_norm_fwd", _backward, _setup)
forbid_gradient("gated_rms_norm_bwd")
