"""The PyTorch path of ssd_scan: products within chunks, state passing between them, by slabs.

The functions are not differentiable: `op` registers `scan_backward` as the gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import accumulator_dtype
from ..library import empty_gradients
from .slabs import ScanSizes, Slab, log2_decays


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
    """The scan.

    Args:
        x, dt, A, B, C, D, seq_pos: see ssd_scan.
        chunk: rows of a chunk. It affects rounding only.

    Returns:
        [T, H, P] with the dtype of `x`.
    """
    sizes, dtype = ScanSizes.infer(x, B, chunk), accumulator_dtype(x, dt, A, B, C, D)
    y = x.new_empty(x.shape)
    D = D.to(dtype).view(-1, 1)
    states = None
    for span in sizes.slab_ranges():
        slab = Slab(sizes, span, x, dt, A, B, seq_pos, dtype)
        states = entering_states(slab, states)
        C_chunks = slab.bc_by_group(C)
        # Reuse this buffer: page faults cost more than the product.
        y_chunks = torch.bmm(C_chunks, states[:-1].flatten(0, 1), out=slab.x_dt_to_end)
        y_chunks = y_chunks.view(slab.shape).mul_(slab.decay_from_start)
        score, decay = C_chunks @ slab.B.mT, slab.new_buffer(sizes.chunk)
        head_y = slab.new_buffer(sizes.head_dim)
        for r in range(sizes.heads_per_group):
            weights = slab.decay(r, decay).mul_(score)
            # A separate add: baddbmm_ loops over the matrices if its output is strided.
            slab.head_matrix(y_chunks, r).add_(
                torch.bmm(weights, slab.head_matrix(slab.x_dt, r), out=head_y)
            )
        state_rows = slab.to_rows(y_chunks, y.shape[1:])
        torch.addcmul(state_rows, x[slab.rows], D, out=y[slab.rows])
    return y


def entering_states(slab: Slab, previous: Tensor | None) -> Tensor:
    """[n + 1, G, N, R P] the states before every chunk of the slab, and after its last."""
    n, groups, _, heads, width = slab.shape
    states = slab.x_dt.new_empty(n + 1, groups, slab.state_dim, heads * width)
    states[0] = 0 if previous is None else previous[-1]
    torch.bmm(slab.B.mT, slab.x_dt_to_end, out=states[1:].flatten(0, 1))
    slab.state_passing_fwd(states)
    return states


def scan_states(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    seq_pos: Tensor,
    last_row: Tensor,
    chunk: int | None = None,
) -> Tensor:
    """[S, H, P, N] the states s_t at the rows t of `last_row`."""
    sizes, dtype = ScanSizes.infer(x, B, chunk), accumulator_dtype(x, dt, A, B)
    if last_row.shape[0] == 0 or sizes.num_rows == 0:
        return x.new_zeros(last_row.shape[0], *x.shape[1:], sizes.state_dim, dtype=dtype)
    states, entering = None, []
    for span in sizes.slab_ranges():
        slab = Slab(sizes, span, x, dt, A, B, seq_pos, dtype)
        states = entering_states(slab, states)
        entering.append(states[:-1])
    chunk_index = last_row // sizes.chunk
    offs_q = torch.arange(sizes.chunk, device=x.device)
    row = (chunk_index * sizes.chunk).unsqueeze(1) + offs_q  # [S, q]
    distance = last_row.unsqueeze(1) - row
    # Rows of the sequence in the chunk of last_row, up to last_row.
    causal_mask = (distance >= 0) & (distance <= seq_pos[last_row].unsqueeze(1))
    # Rows beyond the pack have a decay of 0. The clamp keeps their index valid.
    row = row.clamp(max=sizes.num_rows - 1)
    row_dt = dt[row].to(dtype)
    log, _ = log2_decays(row_dt, A, 1, dtype)
    log_last = log.gather(1, (last_row % sizes.chunk).view(-1, 1, 1).expand(-1, 1, log.shape[2]))
    decay = (log_last - log).masked_fill_(~causal_mask.unsqueeze(2), float("-inf"))
    decay.exp2_().mul_(row_dt)
    # Make the heads of a group adjacent, as in a slab.
    x_dt = (x[row].to(dtype) * decay.unsqueeze(3)).unflatten(2, (sizes.num_groups, -1))
    x_dt = x_dt.transpose(1, 2).flatten(3)
    state = B[row].to(dtype).permute(0, 2, 3, 1) @ x_dt
    # The decay of the entering state is 0 if the sequence begins in this chunk.
    state_before = log_last.exp2().mul_((seq_pos[last_row] > last_row % sizes.chunk).view(-1, 1, 1))
    entering_state = torch.cat(entering)[chunk_index].unflatten(3, (sizes.heads_per_group, -1))
    entering_state = entering_state * state_before.view(
        -1, sizes.num_groups, 1, sizes.heads_per_group, 1
    )
    state = state.view_as(entering_state).add_(entering_state)
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
    """Gradients of x, dt, A, B, C and D. Those not in output_mask are empty.

    Args:
        grad: [T, H, P] gradient of y.
        x, dt, A, B, C, D, seq_pos: see ssd_scan.
        output_mask: which of the six gradients are wanted.
        chunk: rows of a chunk. It affects rounding only.
    """
    sizes, dtype = ScanSizes.infer(x, B, chunk), accumulator_dtype(x, dt, A, B, C, D)
    out = empty_gradients((x, dt, A, B, C, D), output_mask)
    head_sums = A.new_zeros(2, A.shape[0], dtype=dtype)  # dA and dD
    for groups, heads in sizes.group_ranges():
        # The slices of x, dt, A, B, C and D that belong to these groups.
        columns = (heads, heads, heads, groups, groups, heads)
        _group_gradients(
            grad[:, heads],
            (x[:, heads], dt[:, heads], A[heads], B[:, groups], C[:, groups]),
            D[heads],
            seq_pos,
            output_mask,
            [t[:, c] if t.dim() > 1 else t for t, c in zip(out, columns, strict=True)],
            head_sums[:, heads],
            chunk,
        )
    for index, total in ((2, head_sums[0]), (5, head_sums[1])):
        if output_mask[index]:
            out[index].copy_(total)
    return out


def _group_gradients(
    grad: Tensor,
    inputs: tuple[Tensor, ...],
    D: Tensor,
    seq_pos: Tensor,
    output_mask: list[bool],
    out: list[Tensor],
    head_sums: Tensor,
    chunk: int | None,
) -> None:
    """Writes the gradients of some groups of heads into `out` and `head_sums` (dA and dD)."""
    x, dt, A, B, C = inputs
    sizes, dtype = ScanSizes.infer(x, B, chunk), head_sums.dtype

    def load_slab(span: tuple[int, int], previous: Tensor | None) -> tuple[Slab, Tensor]:
        slab = Slab(sizes, span, x, dt, A, B, seq_pos, dtype)
        return slab, entering_states(slab, previous)

    # sqrt(n) checkpointing: save every floor(sqrt(n))-th entering state in the forward, recompute
    # the states between two saved ones in the backward.
    spans = list(sizes.slab_ranges())
    group = math.isqrt(len(spans)) or 1
    saved_states: list[Tensor | None] = []
    slab, states = None, None
    for index, span in enumerate(spans):
        if index % group == 0:
            saved_states.append(None if states is None else states[-1:].clone())
        slab, states = load_slab(span, states)
    d_next = None
    for first in reversed(range(0, len(spans), group)):
        group_spans, entering = spans[first : first + group], [saved_states.pop()]
        for span in group_spans[:-1]:
            slab, states = load_slab(span, entering[-1])
            entering.append(states[-1:].clone())
        for span, previous in zip(reversed(group_spans), reversed(entering), strict=True):
            # The forward loop has left the last slab loaded. All others are recomputed.
            if d_next is not None or len(group_spans) > 1:
                slab = states = None  # free the previous slab first
                slab, states = load_slab(span, previous)
            tensors = (grad, x, A, C, D)
            d_next = _slab_gradients(slab, states, d_next, tensors, output_mask, out, head_sums)
            d_next = d_next[:1].clone()


def _slab_gradients(
    slab: Slab,
    states: Tensor,
    d_next: Tensor | None,
    tensors: tuple[Tensor, ...],
    output_mask: list[bool],
    out: list[Tensor],
    head_sums: Tensor,
) -> Tensor:
    """Writes the slab's gradients into `out`, and adds dA and dD to `head_sums`.

    Returns:
        [n + 1, G, N, R P] gradients of the states. The first is for the previous slab.
    """
    row_grad, x, A, C, D = tensors
    n, groups, chunk, heads, width = slab.shape
    to_x, to_dt, to_A, to_B, to_C, to_D = output_mask
    to_log, to_score = to_dt or to_A, to_B or to_C
    grad = slab.by_group(row_grad)
    C_chunks = slab.bc_by_group(C)
    state_before = states[:-1].flatten(0, 1)

    # Gradients through the states between chunks.
    grad_from_start = slab.merge_heads(grad * slab.decay_from_start)
    d_states = states.new_empty(states.shape)
    # The last state of this slab is the first of the next slab.
    d_states[n] = 0 if d_next is None else d_next[0]
    torch.bmm(C_chunks.mT, grad_from_start, out=d_states[:-1].flatten(0, 1))
    slab.state_passing_bwd(d_states)
    d_state_after = d_states[1:].flatten(0, 1)
    d_x_dt = torch.bmm(slab.B, d_state_after).view(slab.shape).mul_(slab.decay_to_end)
    d_B = d_C = d_score = d_log = None
    if to_B:
        d_B = slab.x_dt_to_end @ d_state_after.mT
    if to_C:
        d_C = grad_from_start @ state_before.mT
    # Reuse the memory of the slab and of the states: page faults cost more than the products.
    buffer = slab.x_dt_to_end
    if to_log:
        torch.bmm(C_chunks, state_before, out=buffer).mul_(grad_from_start)
        d_log = buffer.view(slab.shape).sum(-1)
        # Every term of the state after the chunk has decayed to the chunk's last row.
        state_dot = states[1:].mul_(d_states[1:]).sum(2)
        d_log[:, :, -1] += state_dot.unflatten(2, (heads, width)).sum(3)
    buffer = buffer.view(slab.shape)

    # Gradients within chunks, one head of every group at a time. The diagonal is separate: it has
    # no decay, and in d_log its rounding would drown the small gradients of strong decays.
    score, d_score = C_chunks @ slab.B.mT, slab.new_buffer(chunk).zero_() if to_score else None
    diagonal = score.diagonal(dim1=1, dim2=2).clone().view(n, groups, chunk, 1)
    score.diagonal(dim1=1, dim2=2).zero_()
    decay, weights, d_weights, head_out = (
        slab.new_buffer(size) for size in (chunk, chunk, chunk, width)
    )
    for r in range(heads):
        slab.decay(r, decay)
        torch.mul(decay, score, out=weights)
        head_grad = slab.head_matrix(grad, r)
        if to_x or to_log:
            slab.head_matrix(d_x_dt, r).add_(torch.bmm(weights.mT, head_grad, out=head_out))
        if to_score or to_log:
            torch.bmm(head_grad, slab.head_matrix(slab.x_dt, r).mT, out=d_weights)
        if to_score:
            d_score.addcmul_(d_weights, decay)
        if to_log:
            d_log[..., r] += d_weights.mul_(weights).sum(-1).view(n, groups, chunk)
    if to_log or to_D:
        x = slab.by_group(x)
        x_dot_grad = torch.mul(grad, x, out=buffer).sum(-1)
        head_sums[1] += x_dot_grad.sum((0, 2)).flatten()
    if to_log:
        d_step, dt = torch.mul(d_x_dt, x, out=buffer).sum(-1), slab.dt.squeeze(-1)
        # decay_ij is exp2(log_i - log_j): row sums count positive, column sums negative.
        d_log.addcmul_(d_step, dt, value=-1)
        d_log = (slab.causal_mask.mT.unsqueeze(1) @ d_log).masked_fill_(slab.at_lowest, 0)
        head_sums[0] += (d_log * dt).sum((0, 2)).flatten()
    if to_dt:
        d_step.addcmul_(d_log, A.to(slab.dtype).view(groups, 1, heads))
        out[1][slab.rows] = slab.to_rows(d_step.addcmul_(x_dot_grad, diagonal), (groups * heads,))
    if to_x:
        scale = D.to(slab.dtype).view(groups, 1, heads) + slab.dt.squeeze(-1) * diagonal
        scale = slab.to_rows(scale, (groups * heads, 1))
        rows = slab.to_rows(d_x_dt.mul_(slab.dt), (groups * heads, width))
        torch.addcmul(rows, row_grad[slab.rows], scale, out=out[0][slab.rows])
    if to_B:
        out[3][slab.rows] = slab.to_rows(
            d_B.baddbmm_(d_score.mT, C_chunks), (groups, slab.state_dim)
        )
    if to_C:
        out[4][slab.rows] = slab.to_rows(d_C.baddbmm_(d_score, slab.B), (groups, slab.state_dim))
    return d_states
