"""The Mamba-2 scan over a pack in plain PyTorch: products within chunks, states between them.

Forward and backward keep nothing but the inputs and work through the pack by slabs of chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulator_dtype
from .slabs import Sizes, Slab, binary_logs


def ssd_scan_ref(
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    into: Tensor,
    out_of: Tensor,
    skip: Tensor,
    position: Tensor,
    chunk: int | None = None,
) -> Tensor:
    """s_t = exp(rate dt_t) s_{t-1} + dt_t x_t into_t^T, y_t = s_t out_of_t + skip x_t.

    Not differentiable: `ssd_scan_bwd_ref` is its gradient.

    Args:
        x, dt, rate, into, out_of, skip, position: see ssd_scan.
        chunk: rows of a chunk; changes no result but rounding.

    Returns:
        [T, H, P] with the dtype of `x`.
    """
    sizes, dtype = Sizes.of(x, into, chunk), accumulator_dtype(x, dt, rate, into, out_of, skip)
    y = x.new_empty(x.shape)
    skip = skip.to(dtype).view(-1, 1)
    states = None
    for span in sizes.slabs():
        slab = Slab(sizes, span, x, dt, rate, into, position, dtype)
        states = entering_states(slab, states)
        reads = slab.map(out_of)
        # Into memory that has served: new pages cost more than a pass over the numbers.
        part = torch.bmm(reads, states[:-1].flatten(0, 1), out=slab.weighted).view(slab.shape)
        part.mul_(slab.from_start)
        score, kept = reads @ slab.into.mT, slab.room(sizes.chunk)
        own = slab.room(sizes.width)
        for r in range(sizes.heads):
            seen = slab.kept(r, kept).mul_(score)
            # Added by itself: baddbmm_ with gaps in its result is a loop over matrices.
            slab.head(part, r).add_(torch.bmm(seen, slab.head(slab.value, r), out=own))
        own_rows = slab.by_row(part, y.shape[1:])
        torch.addcmul(own_rows, x[slab.rows], skip, out=y[slab.rows])
    return y


def entering_states(slab: Slab, earlier: Tensor | None) -> Tensor:
    """The states before every chunk and after the last: [n + 1, G, N, R P]."""
    n, groups, _, heads, width = slab.shape
    states = slab.value.new_empty(n + 1, groups, slab.states, heads * width)
    states[0] = 0 if earlier is None else earlier[-1]
    torch.bmm(slab.into.mT, slab.weighted, out=states[1:].flatten(0, 1))
    slab.pass_on(states)
    return states


def ssd_state_ref(
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    into: Tensor,
    position: Tensor,
    last: Tensor,
    chunk: int | None = None,
) -> Tensor:
    """The states s_t at the rows t of `last`; see ssd_state."""
    sizes, dtype = Sizes.of(x, into, chunk), accumulator_dtype(x, dt, rate, into)
    if last.shape[0] == 0 or sizes.rows == 0:
        return x.new_zeros(last.shape[0], *x.shape[1:], sizes.states, dtype=dtype)
    states, found = None, []
    for span in sizes.slabs():
        slab = Slab(sizes, span, x, dt, rate, into, position, dtype)
        states = entering_states(slab, states)
        found.append(states[:-1])
    whole = last // sizes.chunk
    place = torch.arange(sizes.chunk, device=x.device)
    row = (whole * sizes.chunk).unsqueeze(1) + place  # [S, q], those of the last row's chunk
    ahead = last.unsqueeze(1) - row
    sees = (ahead >= 0) & (ahead <= position[last].unsqueeze(1))
    row = row.clamp(max=sizes.rows - 1)
    step = dt[row].to(dtype)
    log, _ = binary_logs(step, rate, 1, dtype)
    at_last = log.gather(1, (last % sizes.chunk).view(-1, 1, 1).expand(-1, 1, log.shape[2]))
    kept = (at_last - log).masked_fill_(~sees.unsqueeze(2), float("-inf")).exp2_().mul_(step)
    # Of every group its heads side by side, as in a slab.
    value = (x[row].to(dtype) * kept.unsqueeze(3)).unflatten(2, (sizes.groups, -1))
    value = value.transpose(1, 2).flatten(3)
    state = into[row].to(dtype).permute(0, 2, 3, 1) @ value
    before = at_last.exp2().mul_((position[last] > last % sizes.chunk).view(-1, 1, 1))
    entered = torch.cat(found)[whole].unflatten(3, (sizes.heads, -1))
    entered = entered * before.view(-1, sizes.groups, 1, sizes.heads, 1)
    state = state.view_as(entered).add_(entered)
    return state.permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()
