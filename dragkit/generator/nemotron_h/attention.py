"""Causal attention over packs, without a [T, T] mask."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from dragkit.generator.nemotron_h.pack import Pack

# Some versions of torch need a flag where keys have fewer heads than queries.
_GQA = {}
if "enable_gqa" in inspect.signature(varlen_attn).parameters:
    _GQA = {"enable_gqa": True}
# Dtypes and the largest head width that `varlen_attn` takes.
_VARLEN_DTYPES, _VARLEN_HEAD_DIM = (torch.float16, torch.bfloat16), 256

# Queries per product on a CPU. Smaller blocks skip more of the upper triangle, and larger ones
# make fewer calls.
_BLOCK = 64


class _BlockedAttention(torch.autograd.Function):
    """softmax(scale q k^T) v below the diagonal. Saves the probabilities for the backward.

    q, k and v are [N, L, D], with the longest sequences first. The first `num_rows[i]` of them have
    tokens in the i-th block of queries, and the others are not computed there.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, num_rows: list[int]
    ) -> Tensor:
        length = query.shape[1]
        future = torch.full((_BLOCK, _BLOCK), float("-inf"), dtype=query.dtype, device=query.device)
        future.triu_(1)
        output, probabilities = torch.empty_like(query), []
        for start, n in zip(range(0, length, _BLOCK), num_rows, strict=True):
            end = min(start + _BLOCK, length)
            score = torch.bmm(query[:n, start:end] * scale, key[:n, :end].mT)
            size = end - start
            # Only the block on the diagonal has keys after its queries.
            score[:, :, start:] += future[:size, :size]
            probability = score.softmax(-1)
            output[:n, start:end] = torch.bmm(probability, value[:n, :end])
            probabilities.append(probability)
        ctx.save_for_backward(query, key, value, *probabilities)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *probabilities = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for index, probability in enumerate(probabilities):
            start = index * _BLOCK
            n, end = len(probability), start + probability.shape[1]
            grad_block = grad[:n, start:end]
            grad_value[:n, :end] += torch.bmm(probability.mT, grad_block)
            grad_score = torch.bmm(grad_block, value[:n, :end].mT)
            # d softmax: p (g - sum p g)
            grad_score = torch._softmax_backward_data(grad_score, probability, -1, grad.dtype)
            grad_query[:n, start:end] = torch.bmm(grad_score, key[:n, :end]) * ctx.scale
            grad_key[:n, :end] += torch.bmm(grad_score.mT, query[:n, start:end] * ctx.scale)
        return grad_query, grad_key, grad_value, None, None


def _flat_heads(x: Tensor, repeat: int = 1) -> Tensor:
    """[B, L, H, D] as contiguous [B * H * repeat, L, D]."""
    x = x.transpose(1, 2)
    if repeat > 1:
        x = x.repeat_interleave(repeat, 1)
    return x.flatten(0, 1).contiguous()


def _takes_varlen(query: Tensor) -> bool:
    """Whether torch's `varlen_attn` computes queries [T, H, D] like these."""
    supported = query.dtype in _VARLEN_DTYPES and query.shape[-1] <= _VARLEN_HEAD_DIM
    return query.is_cuda and supported


def packed_attention(query: Tensor, key: Tensor, value: Tensor, pack: Pack, scale: float) -> Tensor:
    """Attention of every token to itself and to the earlier tokens of its sequence.

    A GPU in half precision runs `varlen_attn`. Otherwise the sequences become rows of a padded
    batch for this product only. No mask is needed there: padding follows the tokens of a row, and
    attention is causal.

    Args:
        query: float [T, H, D].
        key, value: float [T, G, D], each for H / G successive heads.
        pack: the pack of the T tokens.
        scale: factor of the scores.

    Returns:
        float [T, H, D].
    """
    if _takes_varlen(query):
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
            **_GQA,
        )
    # torch's CPU attention is slow at small head widths. A trace takes it nevertheless: the number
    # of blocks would make a new graph for every length.
    blocked = query.device.type == "cpu" and not torch.compiler.is_compiling()
    num_sequences, row, num_heads = pack.ptr.shape[0] - 1, pack.sequence, query.shape[1]
    if blocked:
        # Long sequences first: the sequences that reach a block are then the first rows.
        lengths, order = pack.ptr.diff().sort(descending=True, stable=True)
        row = torch.argsort(order)[row]
    batch_index = row * pack.longest + pack.position

    def in_rows(x: Tensor) -> Tensor:
        flat = x.new_zeros(num_sequences * pack.longest, *x.shape[1:])
        return flat.index_copy(0, batch_index, x).unflatten(0, (num_sequences, pack.longest))

    query, key, value = in_rows(query), in_rows(key), in_rows(value)
    repeat = num_heads // key.shape[2]
    if blocked:
        lengths = lengths.tolist()
        starts = range(0, pack.longest, _BLOCK)
        num_rows = [num_heads * sum(length > start for length in lengths) for start in starts]
        query, key, value = _flat_heads(query), _flat_heads(key, repeat), _flat_heads(value, repeat)
        heads = _BlockedAttention.apply(query, key, value, scale, num_rows)
        heads = heads.unflatten(0, (-1, num_heads))
    else:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        heads = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=repeat > 1
        )
    return heads.transpose(1, 2).flatten(0, 1).index_select(0, batch_index)


def _attend(query: Tensor, key: Tensor, value: Tensor, position: Tensor, scale: float) -> Tensor:
    """Attention of a few tokens of one sequence, float [R, H, D].

    Args:
        query: float [R, H, D].
        key, value: float [L, G, D] of the whole sequence.
        position: int64 [R] positions of the queries in the sequence.
        scale: factor of the scores.
    """
    num_queries, num_heads, dim = query.shape
    num_kv_heads = key.shape[1]
    # Query heads that share a key head become rows of one product, so that keys are not repeated.
    shape = (num_kv_heads, num_heads // num_kv_heads, num_queries, dim)
    query = query.unflatten(1, shape[:2]).permute(1, 2, 0, 3).flatten(1, 2)
    # A query reads no key after its position.
    future = torch.arange(len(key), device=key.device) > position[:, None]
    bias = torch.where(future, float("-inf"), 0.0).to(query.dtype).repeat(shape[1], 1)
    score = torch.baddbmm(bias, query, key.permute(1, 2, 0), alpha=scale)
    output = score.softmax(-1) @ value.transpose(0, 1)
    return output.view(shape).permute(2, 0, 1, 3).flatten(1, 2)


def attention_at(
    query: Tensor, key: Tensor, value: Tensor, pack: Pack, rows: Tensor, scale: float
) -> Tensor:
    """`packed_attention` at some tokens only, one sequence at a time. It suits a CPU.

    Args:
        query: float [A, H, D] of the wanted tokens.
        key, value: float [T, G, D] of all tokens.
        pack: the pack of the T tokens.
        rows: int64 [A] wanted tokens, in any order.
        scale: factor of the scores.

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
    heads = [_attend(*part, scale) for part in parts if len(part[0])]
    return torch.cat([query.new_zeros(0, *query.shape[1:]), *heads])[torch.argsort(order)]
