"""Gated RMS norm by its formula: plain PyTorch with autograd."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulator_dtype


def gated_rms_norm_ref(
    y: Tensor, gate: Tensor | None, weight: Tensor, *, groups: int = 1, eps: float = 1e-5
) -> Tensor:
    """z rsqrt(mean(z^2) + eps) weight with z = y silu(gate) per group, see gated_rms_norm."""
    dtype = accumulator_dtype(y, weight, *([] if gate is None else [gate]))
    z = y.to(dtype)
    if gate is not None:
        z = z * F.silu(gate.to(dtype))
    z = z.unflatten(1, (groups, -1))
    normed = z * (z.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (normed.flatten(1) * weight.to(dtype)).to(y.dtype)
