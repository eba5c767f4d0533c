"""Causal attention over packs, without a mask of all tokens by all tokens."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dragkit.generator.nemotron_h.pack import Pack

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older PyTorch
    varlen_attn = None

# Some versions want to be told that keys have fewer heads than queries, others see it.
_GROUPED = {}
if varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters:
    _GROUPED = {"enable_gqa": True}
# Types and head widths of the library's kernel for ragged sequences.
_RAGGED_TYPES, _RAGGED_WIDTH = (torch.float16, torch.bfloat16), 256

# Queries of one product. Smaller blocks skip more of the upper triangle, larger ones make fewer
# calls.
_BLOCK = 64


class _CausalAttention(torch.autograd.Function):
    """softmax(scale q k^T) v below the diagonal; keeps the probabilities for the backward pass.

    Of the rows [N, L, D] only the first `live[i]` have tokens in the i-th block; the rest of a
    result is not computed.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, live: list[int]
    ) -> Tensor:
        length = query.shape[1]
        future = torch.full((_BLOCK, _BLOCK), float("-inf"), dtype=query.dtype, device=query.device)
        future.triu_(1)
        output, kept = torch.empty_like(query), []
        for start, n in zip(range(0, length, _BLOCK), live, strict=True):
            end = min(start + _BLOCK, length)
            score = torch.bmm(query[:n, start:end] * scale, key[:n, :end].mT)
            size = end - start
            score[:, :, start:] += future[:size, :size]
            probability = score.softmax(-1)
            output[:n, start:end] = torch.bmm(probability, value[:n, :end])
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
            n, end = len(probability), start + probability.shape[1]
            above = grad[:n, start:end]
            grad_value[:n, :end] += torch.bmm(probability.mT, above)
            grad_score = torch.bmm(above, value[:n, :end].mT)
            # d softmax: p (g - sum p g)
            grad_score = torch._softmax_backward_data(grad_score, probability, -1, grad.dtype)
            grad_query[:n, start:end] = torch.bmm(grad_score, key[:n, :end]) * ctx.scale
            grad_key[:n, :end] += torch.bmm(grad_score.mT, query[:n, start:end] * ctx.scale)
        return grad_query, grad_key, grad_value, None, None


def _by_head(x: Tensor, repeat: int = 1) -> Tensor:
    """[B, L, H, D] as contiguous [B * H * repeat, L, D]."""
    x = x.transpose(1, 2)
    if repeat > 1:
        x = x.repeat_interleave(repeat, 1)
    return x.flatten(0, 1).contiguous()


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: Sequence[int] | None = None
) -> Tensor:
    """Every token attends to itself and to those before it in its row.

    On a CPU in blocks of queries: its flash attention is slow at small head widths. Their number
    would make a graph of its own for every length, so a trace takes the library's.

    Args:
        query: float [B, L, H, D]; key, value: float [B, L, G, D], each for H / G successive heads.
        scale: of the scores.
        lengths: of the B rows, descending, for a CPU to leave out what lies behind them; those
            places of the result hold anything. None: all are L.

    Returns:
        float [B, L, H, D].
    """
    repeat = query.shape[2] // key.shape[2]
    if query.device.type != "cpu" or torch.compiler.is_compiling():
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=repeat > 1
        ).transpose(1, 2)
    count = query.shape[2]
    starts = range(0, query.shape[1], _BLOCK)
    whole = [query.shape[1]] * len(query) if lengths is None else lengths
    live = [count * sum(length > start for length in whole) for start in starts]
    heads = _CausalAttention.apply(
        _by_head(query), _by_head(key, repeat), _by_head(value, repeat), scale, live
    )
    return heads.unflatten(0, (-1, count)).transpose(1, 2)


def _takes_ragged(query: Tensor) -> bool:
    """Whether the library's kernel for ragged sequences computes queries [T, H, D] like these."""
    fits = query.dtype in _RAGGED_TYPES and query.shape[-1] <= _RAGGED_WIDTH
    return varlen_attn is not None and query.is_cuda and fits


def packed_attention(query: Tensor, key: Tensor, value: Tensor, pack: Pack, scale: float) -> Tensor:
    """Every token attends to itself and to those before it in its sequence.

    In half precision on a GPU by the library's kernel for ragged sequences. Otherwise sequences
    are laid in rows for this product alone: attention is causal, so no token sees what follows
    its row's end.

    Args:
        query: float [T, H, D]; key, value: float [T, G, D], each for H / G successive heads.
        pack: of the T tokens; scale: of the scores.

    Returns:
        float [T, H, D].
    """
    if _takes_ragged(query):
        return varlen_attn(
            query,
            key,
            value,
            pack.ptr,
            pack.ptr,
            pack.longest,
            pack.longest,
            scale=scale,
            window_size=(-1, 0),
            **_GROUPED,
        )
    rows, row, lengths = pack.ptr.shape[0] - 1, pack.sequence, None
    if query.device.type == "cpu" and not torch.compiler.is_compiling():
        # Long ones first: those with tokens behind some place are then the first rows.
        descending, order = pack.ptr.diff().sort(descending=True, stable=True)
        row, lengths = torch.argsort(order)[row], descending.tolist()
    place = row * pack.longest + pack.position

    def in_rows(x: Tensor) -> Tensor:
        flat = x.new_zeros(rows * pack.longest, *x.shape[1:])
        return flat.index_copy(0, place, x).unflatten(0, (rows, pack.longest))

    mixed = causal_attention(in_rows(query), in_rows(key), in_rows(value), scale, lengths)
    return mixed.flatten(0, 1).index_select(0, place)


def _attend(query: Tensor, key: Tensor, value: Tensor, place: Tensor, scale: float) -> Tensor:
    """A few tokens of one sequence.

    Args:
        query: float [R, H, D]; key, value: float [L, G, D]; scale: of the scores.
        place: int64 [R] of the queries in it.

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


def attention_at(
    query: Tensor, key: Tensor, value: Tensor, pack: Pack, rows: Tensor, scale: float
) -> Tensor:
    """`packed_attention` at some tokens alone, sequence by sequence; for a CPU.

    Args:
        query: float [A, H, D] of the wanted tokens; key, value: float [T, G, D] of all.
        pack: of the T tokens; rows: int64 [A] the wanted ones, in any order; scale: of the scores.

    Returns:
        float [A, H, D].
    """
    sequence = pack.sequence[rows]
    order = torch.argsort(sequence, stable=True)
    lengths = pack.ptr.diff().tolist()
    counts = torch.bincount(sequence, minlength=len(lengths)).tolist()
    parts = zip(
        query[order].split(counts),
        key.split(lengths),
        value.split(lengths),
        pack.position[rows[order]].split(counts),
        strict=True,
    )
    mixed = [_attend(*part, scale) for part in parts if len(part[0])]
    return torch.cat([query.new_zeros(0, *query.shape[1:]), *mixed])[torch.argsort(order)]
