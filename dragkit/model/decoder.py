"""The blocks of a Nemotron-H in one training pass on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dragkit.model.attention import attention_of_rows, causal_attention
from dragkit.model.lora import adapted_linear
from dragkit.model.mixer import mamba_mixer

_SEES_OTHER_TOKENS = ("linear_attention", "full_attention")


class _RMSNorm(torch.autograd.Function):
    """x / rms(x), times a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normed, scale, weight = ctx.saved_tensors
        grad = grad * weight
        along = (grad * normed).mean(-1, keepdim=True)
        return torch.addcmul(grad, normed, along, value=-1).mul_(scale), None, None


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    if x.dtype.itemsize < 4 or norm.weight.requires_grad:
        return norm(x)
    return _RMSNorm.apply(x, norm.weight, norm.variance_epsilon)


def _attention(
    mixer: nn.Module, hidden: Tensor, rows: Tensor | None, position: Tensor | None
) -> Tensor:
    """The attention mixer at all tokens, or at the [B, R] of them that `rows` gathers."""
    config = mixer.config
    shape = {"heads": config.num_attention_heads, "groups": config.num_key_value_heads}
    sizes = [config.num_key_value_heads * mixer.head_dim] * 2
    if rows is None:
        projected = adapted_linear(hidden, [mixer.q_proj, mixer.k_proj, mixer.v_proj])
        query, key, value = projected.split(
            [config.num_attention_heads * mixer.head_dim, *sizes], dim=-1
        )
        mixed = causal_attention(query, key, value, **shape, scale=mixer.scaling)
    else:
        key, value = adapted_linear(hidden, [mixer.k_proj, mixer.v_proj]).split(sizes, dim=-1)
        query = adapted_linear(hidden.flatten(0, 1)[rows], [mixer.q_proj])
        mixed = attention_of_rows(query, key, value, position, **shape, scale=mixer.scaling)
    return adapted_linear(mixed, [mixer.o_proj])


def _feed_forward(mixer: nn.Module, hidden: Tensor) -> Tensor:
    up = adapted_linear(hidden, [mixer.up_proj])
    return adapted_linear(mixer.act_fn(up), [mixer.down_proj])


def hidden_at_rows(model: nn.Module, embeds: Tensor, row: Tensor, place: Tensor) -> Tensor:
    """Last hidden states at some tokens; nothing is computed that they do not depend on.

    From the last block on in which tokens see one another, only the wanted ones are computed.

    Args:
        model: a `NemotronHModel`, with adapters or without.
        embeds: float [B, L, M], padded on the right: every layer is causal, so no token sees it.
        row: int64 [A] and place: int64 [A] of the tokens.

    Returns:
        float [A, M].
    """
    batch, length, _ = embeds.shape
    count = torch.bincount(row, minlength=batch)
    order = torch.argsort(row, stable=True)
    column = torch.empty_like(row)
    column[order] = torch.arange(len(row), device=row.device)
    column -= (count.cumsum(0) - count)[row]
    wide = int(count.max()) if len(row) else 0
    position = place.new_zeros(batch, wide).index_put((row, column), place)
    rows = position + torch.arange(batch, device=row.device)[:, None] * length
    kinds = [block.block_type for block in model.layers]
    last = max((i for i, kind in enumerate(kinds) if kind in _SEES_OTHER_TOKENS), default=-1)

    hidden = embeds
    for index, block in enumerate(model.layers):
        kind, mixer = block.block_type, block.mixer
        normed = _normed(block.norm, hidden)
        if index == last and kind == "full_attention":
            hidden = hidden.flatten(0, 1)[rows] + _attention(mixer, normed, rows, position)
            continue
        if kind == "linear_attention":
            change = mamba_mixer(mixer, normed)
        elif kind == "full_attention":
            change = _attention(mixer, normed, None, None)
        elif kind == "mlp":
            change = _feed_forward(mixer, normed)
        else:
            change = mixer(normed)
        hidden = hidden + change
        if index == last:
            hidden = hidden.flatten(0, 1)[rows]
    if last < 0:
        hidden = hidden.flatten(0, 1)[rows]
    return _normed(model.norm_f, hidden[row, column])
