"""The gradient of the scan in plain PyTorch, slab by slab from the end of the pack."""

from __future__ import annotations

import math

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
    for groups, heads in sizes.parts():
        columns = (heads, heads, heads, groups, groups, heads)
        _part_gradients(
            grad[:, heads],
            (x[:, heads], dt[:, heads], rate[heads], into[:, groups], out_of[:, groups]),
            skip[heads],
            position,
            output_mask,
            [t[:, c] if t.dim() > 1 else t for t, c in zip(out, columns, strict=True)],
            by_head[:, heads],
            chunk,
        )
    for place, total in ((2, by_head[0]), (5, by_head[1])):
        if output_mask[place]:
            out[place].copy_(total)
    return tuple(out)


def _part_gradients(
    grad: Tensor,
    inputs: tuple[Tensor, ...],
    skip: Tensor,
    position: Tensor,
    output_mask: list[bool],
    out: list[Tensor],
    by_head: Tensor,
    chunk: int | None,
) -> None:
    """The gradients of some groups of heads, into `out` and `by_head`."""
    x, dt, rate, into, out_of = inputs
    sizes, dtype = Sizes.of(x, into, chunk), by_head.dtype

    def enter(span: tuple[int, int], earlier: Tensor | None) -> tuple[Slab, Tensor]:
        slab = Slab(sizes, span, x, dt, rate, into, position, dtype)
        return slab, entering_states(slab, earlier)

    # States are wide, so of many slabs only every so many-th entering one is kept on the way on;
    # those between are made again, group by group, on the way back.
    spans = list(sizes.slabs())
    group = math.isqrt(len(spans)) or 1
    starts: list[Tensor | None] = []
    slab, states = None, None
    for number, span in enumerate(spans):
        if number % group == 0:
            starts.append(None if states is None else states[-1:].clone())
        slab, states = enter(span, states)
    later = None
    for first in reversed(range(0, len(spans), group)):
        members, entering = spans[first : first + group], [starts.pop()]
        for span in members[:-1]:
            slab, states = enter(span, entering[-1])
            entering.append(states[-1:].clone())
        for span, earlier in zip(reversed(members), reversed(entering), strict=True):
            if later is not None or len(members) > 1:  # of a last one alone all is at hand
                slab = states = None  # gives back the memory of the one before
                slab, states = enter(span, earlier)
            tensors = (grad, x, rate, out_of, skip)
            later = _slab_gradients(slab, states, later, tensors, output_mask, out, by_head)
            later = later[:1].clone()


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
    row_grad, x, rate, out_of, skip = tensors
    n, groups, chunk, heads, width = slab.shape
    to_x, to_dt, to_rate, to_into, to_out_of, to_skip = output_mask
    to_log, to_score = to_dt or to_rate, to_into or to_out_of
    grad = slab.by_group(row_grad)
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
        d_into = slab.weighted @ d_after.mT
    if to_out_of:
        d_out_of = from_before @ before.mT
    # From here on `room` and the states serve as memory: new pages cost more than a pass over them.
    room = slab.weighted
    if to_log:
        torch.bmm(reads, before, out=room).mul_(from_before)
        d_log = room.view(slab.shape).sum(-1)
        # Whatever is in the state after the chunk has passed the chunk's end.
        passed = states[1:].mul_(d_states[1:]).sum(2)
        d_log[:, :, -1] += passed.unflatten(2, (heads, width)).sum(3)
    room = room.view(slab.shape)

    # Within chunks, one head of every group at a time. The part of a row in its own result stands
    # aside: no decay enters it, and it would drown the small gradients of strong decays.
    score, d_score = reads @ slab.into.mT, slab.room(chunk).zero_() if to_score else None
    own_score = score.diagonal(dim1=1, dim2=2).clone().view(n, groups, chunk, 1)
    score.diagonal(dim1=1, dim2=2).zero_()
    kept, seen, d_seen, part = (slab.room(size) for size in (chunk, chunk, chunk, width))
    for r in range(heads):
        slab.kept(r, kept)
        torch.mul(kept, score, out=seen)
        head_grad = slab.head(grad, r)
        if to_x or to_log:
            slab.head(d_value, r).add_(torch.bmm(seen.mT, head_grad, out=part))
        if to_score or to_log:
            torch.bmm(head_grad, slab.head(slab.value, r).mT, out=d_seen)
        if to_score:
            d_score.addcmul_(d_seen, kept)
        if to_log:
            d_log[..., r] += d_seen.mul_(seen).sum(-1).view(n, groups, chunk)
    if to_log or to_skip:
        x = slab.by_group(x)
        x_grad = torch.mul(grad, x, out=room).sum(-1)
        by_head[1] += x_grad.sum((0, 2)).flatten()
    if to_log:
        d_step, dt = torch.mul(d_value, x, out=room).sum(-1), slab.dt.squeeze(-1)
        # Decays to a row grow with the logarithms up to it in its sequence, those from it shrink.
        d_log.addcmul_(d_step, dt, value=-1)
        d_log = (slab.sees.mT.unsqueeze(1) @ d_log).masked_fill_(slab.lost, 0)
        by_head[0] += (d_log * dt).sum((0, 2)).flatten()
    if to_dt:
        d_step.addcmul_(d_log, rate.to(slab.dtype).view(groups, 1, heads))
        out[1][slab.rows] = slab.by_row(d_step.addcmul_(x_grad, own_score), (groups * heads,))
    if to_x:
        scale = skip.to(slab.dtype).view(groups, 1, heads) + slab.dt.squeeze(-1) * own_score
        scale = slab.by_row(scale, (groups * heads, 1))
        rows = slab.by_row(d_value.mul_(slab.dt), (groups * heads, width))
        torch.addcmul(rows, row_grad[slab.rows], scale, out=out[0][slab.rows])
    if to_into:
        out[3][slab.rows] = slab.by_row(d_into.baddbmm_(d_score.mT, reads), (groups, slab.states))
    if to_out_of:
        out[4][slab.rows] = slab.by_row(
            d_out_of.baddbmm_(d_score, slab.into), (groups, slab.states)
        )
    return d_states
