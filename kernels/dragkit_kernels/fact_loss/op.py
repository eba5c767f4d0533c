"""dragkit::fact_loss_fwd and _bwd. The forward also returns the gradient, for the backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulator_dtype
from ..library import forbid_double_backward, register, register_gradient
from .torch_impl import fact_loss_bwd, fact_loss_fwd


def _fwd_fake(
    logits: Tensor, label: Tensor, fact_ptr: Tensor, rho: float, margin: float
) -> tuple[Tensor, Tensor]:
    x = logits.new_empty(logits.shape, dtype=accumulator_dtype(logits))
    return x.new_empty(fact_ptr.shape[0] - 1), x


def _bwd_fake(grad: Tensor, gradient: Tensor, fact_ptr: Tensor) -> Tensor:
    return gradient.new_empty(gradient.shape)


def _setup(ctx: object, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, fact_ptr, *_ = inputs
    ctx.logits_dtype = logits.dtype
    ctx.save_for_backward(output[1], fact_ptr)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: object, grad: Tensor, _: Tensor | None) -> Tensor:
    return torch.ops.dragkit.fact_loss_bwd(grad, *ctx.saved_tensors).to(ctx.logits_dtype)


register(
    "fact_loss_fwd(Tensor logits, Tensor label, Tensor fact_ptr, float rho, float margin)"
    " -> (Tensor loss, Tensor gradient)",
    fact_loss_fwd,
    _fwd_fake,
)
register(
    "fact_loss_bwd(Tensor grad, Tensor gradient, Tensor fact_ptr) -> Tensor",
    fact_loss_bwd,
    _bwd_fake,
)
register_gradient("fact_loss_fwd", _backward, _setup)
forbid_double_backward("fact_loss_bwd")
