"""The PyTorch path of the scan: products within chunks, states between them, slab by slab.

Forward and backward keep nothing but the inputs. Neither is differentiable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import accumulator_dtype
from ..library import empty_gradients
from .slabs import Sizes, Slab, binary_logs


def scan_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    seq_pos: Tensor,
    chunk: int | None = None,
) -> Tensor:
    """The scan; `scan_backward` is its gradient.

    Args:
        x, dt, A, B, C, D, seq_pos: see ssd_scan.
        chunk: rows of a chunk; changes no result but rounding.

    Returns:
        [T, H, P] with the dtype of `x`.
    """
    sizes, dtype = Sizes.of(x, B, chunk), accumulator_dtype(x, dt, A, B, C, D)
    y = x.new_empty(x.shape)
    D = D.to(dtype).view(-1, 1)
    states = None
    for span in sizes.slabs():
        slab = Slab(sizes, span, x, dt, A, B, seq_pos, dtype)
        states = entering_states(slab, states)
        reads = slab.map(C)
        # Reuse this buffer: page faults cost more than the product.
        part = torch.bmm(reads, states[:-1].flatten(0, 1), out=slab.weighted).view(slab.shape)
        part.mul_(slab.from_start)
        score, decay = reads @ slab.B.mT, slab.room(sizes.chunk)
        own = slab.room(sizes.width)
        for r in range(sizes.heads):
            seen = slab.decay(r, decay).mul_(score)
            # Added by itself: baddbmm_ with gaps in its result is a loop over matrices.
            slab.head(part, r).add_(torch.bmm(seen, slab.head(slab.value, r), out=own))
        own_rows = slab.by_row(part, y.shape[1:])
        torch.addcmul(own_rows, x[slab.rows], D, out=y[slab.rows])
    return y


def entering_states(slab: Slab, earlier: Tensor | None) -> Tensor:
    """The states before every chunk and after the last: [n + 1, G, N, R P]."""
    n, groups, _, heads, width = slab.shape
    states = slab.value.new_empty(n + 1, groups, slab.states, heads * width)
    states[0] = 0 if earlier is None else earlier[-1]
    torch.bmm(slab.B.mT, slab.weighted, out=states[1:].flatten(0, 1))
    slab.pass_on(states)
    return states


def scan_states(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    seq_pos: Tensor,
    last: Tensor,
    chunk: int | None = None,
) -> Tensor:
    """The states s_t at the rows t of `last`; see ssd_state."""
    sizes, dtype = Sizes.of(x, B, chunk), accumulator_dtype(x, dt, A, B)
    if last.shape[0] == 0 or sizes.rows == 0:
        return x.new_zeros(last.shape[0], *x.shape[1:], sizes.states, dtype=dtype)
    states, found = None, []
    for span in sizes.slabs():
        slab = Slab(sizes, span, x, dt, A, B, seq_pos, dtype)
        states = entering_states(slab, states)
        found.append(states[:-1])
    whole = last // sizes.chunk
    place = torch.arange(sizes.chunk, device=x.device)
    row = (whole * sizes.chunk).unsqueeze(1) + place  # [S, q], those of the last row's chunk
    ahead = last.unsqueeze(1) - row
    causal_mask = (ahead >= 0) & (ahead <= seq_pos[last].unsqueeze(1))
    row = row.clamp(max=sizes.rows - 1)
    step = dt[row].to(dtype)
    log, _ = binary_logs(step, A, 1, dtype)
    at_last = log.gather(1, (last % sizes.chunk).view(-1, 1, 1).expand(-1, 1, log.shape[2]))
    decay = (at_last - log).masked_fill_(~causal_mask.unsqueeze(2), float("-inf"))
    decay.exp2_().mul_(step)
    # Of every group its heads side by side, as in a slab.
    value = (x[row].to(dtype) * decay.unsqueeze(3)).unflatten(2, (sizes.groups, -1))
    value = value.transpose(1, 2).flatten(3)
    state = B[row].to(dtype).permute(0, 2, 3, 1) @ value
    before = at_last.exp2().mul_((seq_pos[last] > last % sizes.chunk).view(-1, 1, 1))
    entered = torch.cat(found)[whole].unflatten(3, (sizes.heads, -1))
    entered = entered * before.view(-1, sizes.groups, 1, sizes.heads, 1)
    state = state.view_as(entered).add_(entered)
    return state.permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()


def scan_backward(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    seq_pos: Tensor,
    output_mask: list[bool],
    chunk: int | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of the six float inputs of ssd_scan; those not in output_mask come back empty.

    Args:
        grad: [T, H, P]; the others as for ssd_scan.
        output_mask: which of x, dt, A, B, C, D.
        chunk: rows of a chunk; changes no result but rounding.
    """
    sizes, dtype = Sizes.of(x, B, chunk), accumulator_dtype(x, dt, A, B, C, D)
    out = empty_gradients((x, dt, A, B, C, D), output_mask)
    by_head = A.new_zeros(2, A.shape[0], dtype=dtype)  # of A and D
    for groups, heads in sizes.parts():
        columns = (heads, heads, heads, groups, groups, heads)
        _part_gradients(
            grad[:, heads],
            (x[:, heads], dt[:, heads], A[heads], B[:, groups], C[:, groups]),
            D[heads],
            seq_pos,
            output_mask,
            [t[:, c] if t.dim() > 1 else t for t, c in zip(out, columns, strict=True)],
            by_head[:, heads],
            chunk,
        )
    for place, total in ((2, by_head[0]), (5, by_head[1])):
        if output_mask[place]:
            out[place].copy_(total)
    return out


def _part_gradients(
    grad: Tensor,
    inputs: tuple[Tensor, ...],
    D: Tensor,
    seq_pos: Tensor,
    output_mask: list[bool],
    out: list[Tensor],
    by_head: Tensor,
    chunk: int | None,
) -> None:
    """The gradients of some groups of heads, into `out` and `by_head`."""
    x, dt, A, B, C = inputs
    sizes, dtype = Sizes.of(x, B, chunk), by_head.dtype

    def enter(span: tuple[int, int], earlier: Tensor | None) -> tuple[Slab, Tensor]:
        slab = Slab(sizes, span, x, dt, A, B, seq_pos, dtype)
        return slab, entering_states(slab, earlier)

    # sqrt(n) checkpointing: keep every floor(sqrt(n))-th entering state in the forward, recompute
    # the others, group by group, in the backward.
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
            tensors = (grad, x, A, C, D)
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
    """Writes the slab's gradients into `out`, adds those of A and D to `by_head`.

    Returns the gradients of the states [n + 1, G, N, R P], the first of them for the slab before.
    """
    row_grad, x, A, C, D = tensors
    n, groups, chunk, heads, width = slab.shape
    to_x, to_dt, to_A, to_B, to_C, to_D = output_mask
    to_log, to_score = to_dt or to_A, to_B or to_C
    grad = slab.by_group(row_grad)
    reads = slab.map(C)
    before = states[:-1].flatten(0, 1)

    # Through the states between chunks.
    from_before = slab.wide(grad * slab.from_start)
    d_states = states.new_empty(states.shape)
    d_states[n] = 0 if later is None else later[0]
    torch.bmm(reads.mT, from_before, out=d_states[:-1].flatten(0, 1))
    slab.pass_back(d_states)
    d_after = d_states[1:].flatten(0, 1)
    d_value = torch.bmm(slab.B, d_after).view(slab.shape).mul_(slab.to_end)
    d_B = d_C = d_score = d_log = None
    if to_B:
        d_B = slab.weighted @ d_after.mT
    if to_C:
        d_C = from_before @ before.mT
    # Reuse the buffers of `room` and of the states: page faults cost more than the products.
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
    score, d_score = reads @ slab.B.mT, slab.room(chunk).zero_() if to_score else None
    own_score = score.diagonal(dim1=1, dim2=2).clone().view(n, groups, chunk, 1)
    score.diagonal(dim1=1, dim2=2).zero_()
    decay, seen, d_seen, part = (slab.room(size) for size in (chunk, chunk, chunk, width))
    for r in range(heads):
        slab.decay(r, decay)
        torch.mul(decay, score, out=seen)
        head_grad = slab.head(grad, r)
        if to_x or to_log:
            slab.head(d_value, r).add_(torch.bmm(seen.mT, head_grad, out=part))
        if to_score or to_log:
            torch.bmm(head_grad, slab.head(slab.value, r).mT, out=d_seen)
        if to_score:
            d_score.addcmul_(d_seen, decay)
        if to_log:
            d_log[..., r] += d_seen.mul_(seen).sum(-1).view(n, groups, chunk)
    if to_log or to_D:
        x = slab.by_group(x)
        x_grad = torch.mul(grad, x, out=room).sum(-1)
        by_head[1] += x_grad.sum((0, 2)).flatten()
    if to_log:
        d_step, dt = torch.mul(d_value, x, out=room).sum(-1), slab.dt.squeeze(-1)
        # Decays to a row grow with the logarithms up to it in its sequence, those from it shrink.
        d_log.addcmul_(d_step, dt, value=-1)
        d_log = (slab.causal_mask.mT.unsqueeze(1) @ d_log).masked_fill_(slab.lost, 0)
        by_head[0] += (d_log * dt).sum((0, 2)).flatten()
    if to_dt:
        d_step.addcmul_(d_log, A.to(slab.dtype).view(groups, 1, heads))
        out[1][slab.rows] = slab.by_row(d_step.addcmul_(x_grad, own_score), (groups * heads,))
    if to_x:
        scale = D.to(slab.dtype).view(groups, 1, heads) + slab.dt.squeeze(-1) * own_score
        scale = slab.by_row(scale, (groups * heads, 1))
        rows = slab.by_row(d_value.mul_(slab.dt), (groups * heads, width))
        torch.addcmul(rows, row_grad[slab.rows], scale, out=out[0][slab.rows])
    if to_B:
        out[3][slab.rows] = slab.by_row(d_B.baddbmm_(d_score.mT, reads), (groups, slab.states))
    if to_C:
        out[4][slab.rows] = slab.by_row(d_C.baddbmm_(d_score, slab.B), (groups, slab.states))
    return d_states
