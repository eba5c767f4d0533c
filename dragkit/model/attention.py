"""Causal attention in blocks of queries, for head widths at which CPU flash attention is slow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Queries of one product. Smaller blocks skip more of the upper triangle, larger ones make fewer
# calls.
_BLOCK = 64


class _CausalAttention(torch.autograd.Function):
    """softmax(scale q k^T) v below the diagonal; keeps the probabilities for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        length = query.shape[1]
        future = torch.ones(_BLOCK, _BLOCK, dtype=torch.bool, device=query.device).triu(1)
        output, kept = torch.empty_like(query), []
        for start in range(0, length, _BLOCK):
            end = min(start + _BLOCK, length)
            score = torch.bmm(query[:, start:end] * scale, key[:, :end].mT)
            size = end - start
            score[:, :, start:].masked_fill_(future[:size, :size], float("-inf"))
            probability = score.softmax(-1)
            output[:, start:end] = torch.bmm(probability, value[:, :end])
            kept.append(probability)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for index, probability in enumerate(kept):
            start = index * _BLOCK
            end = start + probability.shape[1]
            above = grad[:, start:end]
            grad_value[:, :end].baddbmm_(probability.mT, above)
            grad_score = torch.bmm(above, value[:, :end].mT)
            # d softmax: p (g - sum p g)
            grad_score = torch._softmax_backward_data(grad_score, probability, -1, grad.dtype)
            grad_query[:, start:end] = torch.bmm(grad_score, key[:, :end]) * ctx.scale
            grad_key[:, :end].baddbmm_(grad_score.mT, query[:, start:end], alpha=ctx.scale)
        return grad_query, grad_key, grad_value, None


def _split(x: Tensor, heads: int) -> Tensor:
    """[B, L, H * D] as contiguous [B * H, L, D]."""
    batch, length, width = x.shape
    x = x.view(batch, length, heads, width // heads).transpose(1, 2)
    return x.reshape(batch * heads, length, width // heads)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, heads: int, groups: int, scale: float
) -> Tensor:
    """Every token attends to itself and those before it in its row.

    Args:
        query: float [B, L, heads * D]; key, value: float [B, L, groups * D], a group of keys for
            heads / groups consecutive heads.
        scale: of the scores.

    Returns:
        float [B, L, heads * D].
    """
    batch, length, width = query.shape
    repeat = heads // groups
    split = [_split(query, heads)]
    for x in (key, value):
        x = _split(x, groups)
        split.append(x.repeat_interleave(repeat, 0) if repeat > 1 else x)
    output = _CausalAttention.apply(*split, scale)
    return output.view(batch, heads, length, -1).transpose(1, 2).reshape(batch, length, width)


def attention_of_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    *,
    heads: int,
    groups: int,
    scale: float,
) -> Tensor:
    """The same for a few queries of every row.

    Args:
        query: float [B, R, heads * D]; key, value: float [B, L, groups * D].
        position: int64 [B, R] places of the queries in their row.
        scale: of the scores.

    Returns:
        float [B, R, heads * D].
    """
    batch, count, width = query.shape
    length, dim = key.shape[1], width // heads
    # Heads of one group stand below each other, so keys are not repeated.
    query = query.view(batch, count, groups, -1, dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    key = key.view(batch, length, groups, dim).transpose(1, 2)
    value = value.view(batch, length, groups, dim).transpose(1, 2)
    future = torch.arange(length, device=key.device) > position[..., None]
    future = future.repeat(1, heads // groups, 1)[:, None]
    score = (query * scale) @ key.mT
    output = score.masked_fill(future, float("-inf")).softmax(-1) @ value
    output = output.view(batch, groups, heads // groups, count, dim)
    return output.permute(0, 3, 1, 2, 4).reshape(batch, count, width)
