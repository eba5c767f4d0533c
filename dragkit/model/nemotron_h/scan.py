"""The Mamba-2 scan in chunks, forward and backward as batched matrix products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens of a chunk on a CPU; the size changes no result but rounding.
CHUNK = 32


def _chunks(tensor: Tensor, chunk: int) -> Tensor:
    """[B, L, H, ...] as contiguous [B, c, H, q, ...] with zeros behind the last token."""
    if pad := -tensor.shape[1] % chunk:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, pad))
    return tensor.unflatten(1, (-1, chunk)).transpose(2, 3).contiguous()


def _tokens(tensor: Tensor, length: int) -> Tensor:
    """The way back: a view [B, L, H, ...]."""
    return tensor.transpose(2, 3).flatten(1, 2)[:, :length]


def _lower(rows: Tensor, columns: Tensor, diagonal: int) -> Tensor:
    """exp(rows_i - columns_j) for j <= i - diagonal, else 0: [..., n] twice to [..., n, n]."""
    size = rows.shape[-1]
    above = torch.full((size, size), float("-inf"), dtype=rows.dtype, device=rows.device)
    difference = rows[..., :, None] - columns[..., None, :]
    # Masked before the exponential: above the diagonal it would overflow.
    return difference.add_(above.triu_(1 - diagonal)).exp_()


class _ChunkScan(torch.autograd.Function):
    """See `chunk_scan`. In the names, `d_x` is the gradient of `x`.

    Everything is laid out [B, c, H, q, ...], c chunks of q tokens; G groups stand for their heads
    as [B, c, G, 1, ...] against [B, c, G, R, ...].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        rate: Tensor,
        into: Tensor,
        out_of: Tensor,
        skip: Tensor,
        chunk: int,
    ) -> Tensor:
        length, heads, groups = x.shape[1], x.shape[2], into.shape[2]
        x, dt = _chunks(x, chunk), _chunks(dt, chunk)
        into, out_of = _chunks(into, chunk), _chunks(out_of, chunk)
        value = x * dt[..., None]
        decay = (dt * rate[:, None]).cumsum(-1)  # [B, c, H, q], logarithms from the chunk's start
        kept = _lower(decay, decay, 0)
        split = (groups, heads // groups)
        seen = (out_of @ into.mT).unsqueeze(3) * kept.unflatten(2, split)
        seen = seen.flatten(2, 3)
        y = (seen @ value).addcmul_(x, skip[:, None, None])
        saved = [x, dt, rate, into, out_of, skip, value, kept, seen]
        if x.shape[1] > 1:
            from_start = decay.exp()
            to_end = (decay[..., -1:] - decay).exp()
            feed = (into.unsqueeze(3) * to_end.unflatten(2, split)[..., None]).flatten(2, 3)
            read = (out_of.unsqueeze(3) * from_start.unflatten(2, split)[..., None]).flatten(2, 3)
            # States by head, one row per chunk: [B, H, c, N * P].
            gained = (feed.mT @ value).transpose(1, 2).flatten(3)
            total = decay[..., -1].mT.cumsum(-1)  # [B, H, c]
            carry = _lower(F.pad(total[..., :-1], (1, 0)), total, 1)
            start = (carry @ gained).unflatten(3, (into.shape[-1], -1)).transpose(1, 2).contiguous()
            y.view(-1, *y.shape[3:]).baddbmm_(read.flatten(0, 2), start.flatten(0, 2))
            saved += [from_start, to_end, feed, read, gained, carry, start]
        ctx.save_for_backward(*saved)
        ctx.length, ctx.split = length, split
        return _tokens(y, length).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, rate, into, out_of, skip, value, kept, seen, *carried = ctx.saved_tensors
        grad = _chunks(grad, x.shape[3])
        d_value = seen.mT @ grad
        d_seen = grad @ value.mT
        d_score = (d_seen * kept).unflatten(2, ctx.split).sum(3)
        d_into, d_out_of = d_score.mT @ out_of, d_score @ into
        d_kept = d_seen.mul_(seen)  # times kept, as the exponential's gradient wants it
        d_decay = d_kept.sum(-1) - d_kept.sum(-2)
        if carried:
            from_start, to_end, feed, read, gained, carry, start = carried
            d_read = grad @ start.mT
            d_start = (read.mT @ grad).transpose(1, 2).flatten(3)
            d_gained = (carry.mT @ d_start).unflatten(3, start.shape[3:]).transpose(1, 2)
            d_gained = d_gained.contiguous()
            d_value.view(-1, *d_value.shape[3:]).baddbmm_(
                feed.flatten(0, 2), d_gained.flatten(0, 2)
            )
            d_feed = value @ d_gained.mT
            d_out_of += (d_read * from_start[..., None]).unflatten(2, ctx.split).sum(3)
            d_into += (d_feed * to_end[..., None]).unflatten(2, ctx.split).sum(3)
            fed = d_feed.mul_(feed).sum(-1)
            d_decay += d_read.mul_(read).sum(-1) - fed
            d_carry = (d_start @ gained.mT).mul_(carry)
            # carry_ij = exp(total_{i-1} - total_j)
            d_total = F.pad(d_carry.sum(-1)[..., 1:], (0, 1)) - d_carry.sum(-2)
            d_end = d_total.flip(-1).cumsum(-1).flip(-1).mT
            d_decay[..., -1] += d_end + fed.sum(-1)
        d_step = d_decay.flip(-1).cumsum(-1).flip(-1)
        d_dt = (d_value * x).sum(-1).addcmul_(d_step, rate[:, None])
        d_rate = (d_step * dt).sum((0, 1, 3)) if ctx.needs_input_grad[2] else None
        d_skip = (grad * x).sum((0, 1, 3, 4)) if ctx.needs_input_grad[5] else None
        d_x = d_value.mul_(dt[..., None]).addcmul_(grad, skip[:, None, None])
        by_token = [_tokens(tensor, ctx.length) for tensor in (d_x, d_dt, d_into, d_out_of)]
        return by_token[0], by_token[1], d_rate, by_token[2], by_token[3], d_skip, None


def chunk_scan(
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    into: Tensor,
    out_of: Tensor,
    skip: Tensor,
    chunk: int = CHUNK,
) -> Tensor:
    """Mamba-2: s_t = exp(rate dt_t) s_{t-1} + dt_t x_t into_t^T, y_t = s_t out_of_t + skip x_t.

    The state is zero before the first token. Inside a chunk the recurrence is one masked product
    per head, and between chunks one over the chunks' states (Dao and Gu 2024, section 6). Maps stay
    at the width of their groups.

    Args:
        x: float [B, L, H, P] inputs; dt: float [B, L, H] step sizes, not negative.
        rate: float [H], negative; skip: float [H].
        into, out_of: float [B, L, G, N], with H a multiple of G.
        chunk: tokens per chunk.

    Returns:
        float [B, L, H, P].
    """
    return _ChunkScan.apply(x, dt, rate, into, out_of, skip, chunk)
