"""The gradient of the scan in plain PyTorch, slab by slab from the end of the pack."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulator_dtype
from .reference import entering_states
from .slabs import Sizes, Slab


def ssd_scan_bwd_ref(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    into: Tensor,
    out_of: Tensor,
    skip: Tensor,
    position: Tensor,
    output_mask: list[bool],
    chunk: int | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of the six float inputs of ssd_scan; those not in output_mask come back empty.

    Args:
        grad: [T, H, P]; the others as for ssd_scan.
        output_mask: which of x, dt, rate, into, out_of, skip.
        chunk: rows of a chunk; changes no result but rounding.
    """
    sizes, dtype = Sizes.of(x, into, chunk), accumulator_dtype(x, dt, rate, into, out_of, skip)
    inputs = (x, dt, rate, into, out_of, skip)
    out = [
        t.new_empty(t.shape if wanted else (0,))
        for t, wanted in zip(inputs, output_mask, strict=True)
    ]
    by_head = rate.new_zeros(2, rate.shape[0], dtype=dtype)  # of rate and skip
    # The states of every slab from the first on, then the slabs from the last back.
    slab, states, stack = None, None, []
    for span in sizes.slabs():
        slab = Slab(sizes, span, x, dt, rate, into, position, dtype)
        states = entering_states(slab, states)
        stack.append((span, states))
    later = None
    while stack:
        span, states = stack.pop()
        if later is not None:  # of the last one everything is at hand
            slab = Slab(sizes, span, x, dt, rate, into, position, dtype)
        tensors = (grad, x, rate, out_of, skip)
        later = _slab_gradients(slab, states, later, tensors, output_mask, out, by_head)
    for place, total in ((2, by_head[0]), (5, by_head[1])):
        if output_mask[place]:
            out[place].copy_(total)
    return tuple(out)


def _slab_gradients(
    slab: Slab,
    states: Tensor,
    later: Tensor | None,
    tensors: tuple[Tensor, ...],
    output_mask: list[bool],
    out: list[Tensor],
    by_head: Tensor,
) -> Tensor:
    """Writes the slab's gradients into `out`, adds those of rate and skip to `by_head`.

    Returns the gradients of the states [n + 1, G, N, R P], the first of them for the slab before.
    """
    grad, x, rate, out_of, skip = tensors
    n, groups, chunk, heads, width = slab.shape
    to_x, to_dt, to_rate, to_into, to_out_of, to_skip = output_mask
    to_log, to_score = to_dt or to_rate, to_into or to_out_of
    grad = slab.by_group(grad)
    reads = slab.map(out_of)
    before = states[:-1].flatten(0, 1)

    # Through the states between chunks.
    from_before = slab.wide(grad * slab.from_start)
    d_states = states.new_empty(states.shape)
    d_states[n] = 0 if later is None else later[0]
    torch.bmm(reads.mT, from_before, out=d_states[:-1].flatten(0, 1))
    slab.pass_back(d_states)
    d_after = d_states[1:].flatten(0, 1)
    d_value = torch.bmm(slab.into, d_after).view(slab.shape).mul_(slab.to_end)
    d_into = d_out_of = d_score = d_log = None
    if to_into:
        d_into = slab.wide(slab.value * slab.to_end) @ d_after.mT
    if to_out_of:
        d_out_of = from_before @ before.mT
    if to_log:
        read = torch.bmm(reads, before).mul_(from_before).view(slab.shape).sum(-1)
        fed = (d_value * slab.value).sum(-1)
        through = (d_states[1:] * states[:-1]).unflatten(3, (heads, width)).sum((2, 4))
        d_log = read - fed
        d_log[:, :, -1] += through.mul_(slab.through[:, :, 0, :, 0]) + fed.sum(2)

    # Within chunks, one head of every group at a time.
    score, kept = reads @ slab.into.mT, slab.square()
    seen, d_seen = slab.square(), slab.square()
    d_score = slab.square().zero_() if to_score else None
    for r in range(heads):
        slab.kept(r, kept)
        torch.mul(kept, score, out=seen)
        head_grad = slab.head(grad, r)
        if to_x or to_log:
            slab.add_head(d_value, r, torch.bmm(seen.mT, head_grad))
        if to_score or to_log:
            torch.bmm(head_grad, slab.head(slab.value, r).mT, out=d_seen)
        if to_score:
            d_score.addcmul_(d_seen, kept)
        if to_log:
            d_seen.mul_(seen)
            d_log[..., r] += (d_seen.sum(-1) - d_seen.sum(-2)).view(n, groups, chunk)
    if to_log:
        d_step = slab.sum_from_row(d_log)
        by_head[0] += (d_step * slab.dt.squeeze(-1)).sum((0, 2)).flatten()
    if to_dt or to_x or to_skip:
        own = slab.by_group(x)
    if to_dt:
        scale = rate.to(slab.dtype).view(groups, 1, heads)
        slab.put(out[1], (d_value * own).sum(-1).addcmul_(d_step, scale))
    if to_skip:
        by_head[1] += (grad * own).sum((0, 2, 4)).flatten()
    if to_x:
        scale = skip.to(slab.dtype).view(groups, 1, heads, 1)
        slab.put(out[0], d_value.mul_(slab.dt).addcmul_(grad, scale))
    if to_into:
        slab.put(out[3], d_into.baddbmm_(d_score.mT, reads))
    if to_out_of:
        slab.put(out[4], d_out_of.baddbmm_(d_score, slab.into))
    return d_states
