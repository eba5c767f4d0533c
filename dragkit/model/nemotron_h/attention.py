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
        future = torch.full((_BLOCK, _BLOCK), float("-inf"), dtype=query.dtype, device=query.device)
        future.triu_(1)
        output, kept = torch.empty_like(query), []
        for start in range(0, length, _BLOCK):
            end = min(start + _BLOCK, length)
            score = torch.bmm(query[:, start:end] * scale, key[:, :end].mT)
            size = end - start
            score[:, :, start:] += future[:size, :size]
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
            grad_value[:, :end] += torch.bmm(probability.mT, above)
            grad_score = torch.bmm(above, value[:, :end].mT)
            # d softmax: p (g - sum p g)
            grad_score = torch._softmax_backward_data(grad_score, probability, -1, grad.dtype)
            grad_query[:, start:end] = torch.bmm(grad_score, key[:, :end]) * ctx.scale
            grad_key[:, :end] += torch.bmm(grad_score.mT, query[:, start:end] * ctx.scale)
        return grad_query, grad_key, grad_value, None


def _by_head(x: Tensor, repeat: int = 1) -> Tensor:
    """[B, L, H, D] as contiguous [B * H * repeat, L, D]."""
    x = x.transpose(1, 2)
    if repeat > 1:
        x = x.repeat_interleave(repeat, 1)
    return x.flatten(0, 1).contiguous()


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Every token attends to itself and to those before it in its row.

    Args:
        query: float [B, L, H, D]; key, value: float [B, L, G, D], each for H / G successive heads.
        scale: of the scores.

    Returns:
        float [B, L, H, D].
    """
    repeat = query.shape[2] // key.shape[2]
    heads = _CausalAttention.apply(
        _by_head(query), _by_head(key, repeat), _by_head(value, repeat), scale
    )
    return heads.unflatten(0, (-1, query.shape[2])).transpose(1, 2)


def attention_at(query: Tensor, key: Tensor, value: Tensor, place: Tensor, scale: float) -> Tensor:
    """The same for a few tokens of one row.

    Args:
        query: float [R, H, D]; key, value: float [L, G, D]; scale: of the scores.
        place: int64 [R] of the queries in the row.

    Returns:
        float [R, H, D].
    """
    count, heads, dim = query.shape
    groups = key.shape[1]
    # Heads of one group stand below each other, so that keys need not be repeated.
    shape = (groups, heads // groups, count, dim)
    query = query.unflatten(1, shape[:2]).permute(1, 2, 0, 3).flatten(1, 2)
    future = torch.arange(len(key), device=key.device) > place[:, None]
    bias = torch.where(future, float("-inf"), 0.0).to(query.dtype).repeat(heads // groups, 1)
    score = torch.baddbmm(bias, query, key.permute(1, 2, 0), alpha=scale)
    output = score.softmax(-1) @ value.transpose(0, 1)
    return output.view(shape).permute(2, 0, 1, 3).flatten(1, 2)
