"""dragkit::attention_pool_fwd and _bwd. The forward also returns the attention weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..library import forbid_double_backward, register, register_gradient
from .torch_impl import attention_pool_bwd, attention_pool_fwd


def _fwd_fake(states: Tensor, query: Tensor, rows: Tensor, ptr: Tensor) -> tuple[Tensor, Tensor]:
    return states.new_empty(ptr.shape[0] - 1, states.shape[1]), states.new_empty(rows.shape)


def _bwd_fake(grad: Tensor, attention: Tensor, states: Tensor, rows: Tensor, ptr: Tensor) -> Tensor:
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
    _fwd_fake,
)
register(
    "attention_pool_bwd(Tensor grad, Tensor attention, Tensor states, Tensor rows, Tensor ptr) "
    "-> Tensor",
    attention_pool_bwd,
    _bwd_fake,
)
register_gradient("attention_pool_fwd", _backward, _setup)
forbid_double_backward("attention_pool_bwd")
