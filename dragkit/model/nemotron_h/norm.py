"""RMS normalisation with a frozen weight and its gradient in few passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) times a weight that gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normed, scale, weight = ctx.saved_tensors
        grad = grad * weight
        along = (grad * normed).mean(-1, keepdim=True)
        return grad.addcmul_(normed, along, value=-1).mul_(scale), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, the mean over each of the groups of the last axis.

    Args:
        x: float [..., D], normalised in float32 at least; weight: [D]; groups: a divisor of D.

    Returns:
        float [..., D] of the type of x.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    weight = weight.to(wide.dtype)
    if weight.requires_grad:
        wide = wide.unflatten(-1, (groups, -1))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return ((wide * scale).flatten(-2) * weight).to(x.dtype)
    if groups == 1:
        return _RMSNorm.apply(wide, weight, eps).to(x.dtype)
    wide, weight = wide.unflatten(-1, (groups, -1)), weight.unflatten(-1, (groups, -1))
    return _RMSNorm.apply(wide, weight, eps).flatten(-2).to(x.dtype)
