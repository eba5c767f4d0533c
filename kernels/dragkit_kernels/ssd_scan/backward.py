"""Triton backward of ssd_scan: the kernel for x and D, and the launches of all gradients.

The gradients of dt and A and those of B and C have separate kernels, because one kernel for all
would exceed the registers of a thread.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import row_strided, spec
from ..library import empty_gradients
from .backward_bc import _ssd_scan_bwd_bc_kernel
from .backward_dt import DOT_BLOCK, _ssd_scan_bwd_dt_kernel
from .decays import (
    GRADIENT_LIMITS,
    TILES,
    causal_mask,
    chunk_rows,
    finite,
    load_rows,
    load_state,
    nonfinite,
    product,
    scan_tile,
    scores,
)
from .states import ScanInputs, chunk_states


@triton.jit(do_not_specialize=["num_rows", "num_heads", "heads_per_group"])
def _ssd_scan_bwd_x_kernel(
    grad_ptr, x_ptr, dt_ptr, log_ptr, B_ptr, C_ptr, D_ptr, seq_pos_ptr, d_state_ptr,
    d_x_ptr, dot_ptr, state_dot_ptr, d_D_ptr,
    num_rows, num_heads, heads_per_group, head_dim, state_dim,
    stride_grad, stride_x, stride_B, stride_C,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, LOW_PREC: tl.constexpr,
):  # fmt: skip
    """dx_j = dt_j v_j + (D + dt_j C_j . B_j) dy_j for the rows j of a chunk and a head.

    v_j = sum_{i>j} exp(log_i - log_j) (C_i . B_j) dy_i + exp(log_end - log_j) dS B_j, where dS is
    the gradient of the state after the chunk. The kernel also stores dot_j = x_j . v_j, the sum of
    x_j . dy_j over the rows (d_D), and the sum of dt_j times the dS term of dot_j (state_dot).
    One program per chunk and head.
    """
    pid_h, chunk = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    start, offs_q, mask_q, seq_pos, last_pos = chunk_rows(seq_pos_ptr, chunk, num_rows, Q)
    dot_dtype = x_ptr.dtype.element_ty
    B_ptr += start * stride_B + pid_h // heads_per_group * state_dim
    C_ptr += start * stride_C + pid_h // heads_per_group * state_dim
    d_state_ptr += tl.program_id(0).to(tl.int64) * head_dim * state_dim
    offs_log = pid_h.to(tl.int64) * num_rows + start + offs_q
    log = tl.load(log_ptr + offs_log, mask=mask_q, other=0.0)
    dt_ptr += start * num_heads + pid_h
    dt = tl.load(dt_ptr + offs_q * num_heads, mask=mask_q, other=0.0)
    score, diagonal = scores(
        B_ptr, C_ptr, log, offs_q, mask_q, seq_pos, state_dim, stride_B, stride_C,
        dot_dtype, Q, BLOCK_N, LOW_PREC,
    )  # fmt: skip
    # Only rows of the sequence that reaches the chunk's end act on the state after it.
    reaches_end = mask_q & (Q - 1 - offs_q <= last_pos)
    log_end = tl.sum(tl.where(offs_q == Q - 1, log, 0.0), 0)
    decay_to_end = tl.exp2(tl.where(reaches_end, log_end - log, 0.0))
    # The diagonal term has no decay, so it is added to D.
    grad_scale = tl.load(D_ptr + pid_h).to(tl.float32) + dt * diagonal
    dot = tl.zeros((Q,), tl.float32)
    state_dot, x_dot_grad = dot, dot
    grad_ptr += start * stride_grad + pid_h * head_dim
    x_ptr += start * stride_x + pid_h * head_dim
    for start_p in tl.range(0, head_dim, BLOCK_P, num_stages=1):
        offs_p = start_p + tl.arange(0, BLOCK_P)
        d_x_dt = tl.zeros((Q, BLOCK_P), tl.float32)
        for start_n in tl.range(0, state_dim, BLOCK_N, num_stages=1):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            B = load_rows(B_ptr, offs_q, mask_q, stride_B, offs_n, state_dim)
            d_state = load_state(d_state_ptr, offs_p, head_dim, offs_n, state_dim)
            d_x_dt = product(B, tl.trans(d_state), d_x_dt, LOW_PREC, dot_dtype)
        # Select: the gradient of the state may be NaN because of another sequence.
        d_x_dt = tl.where(reaches_end[:, None], d_x_dt * decay_to_end[:, None], 0.0)
        x = load_rows(x_ptr, offs_q, mask_q, stride_x, offs_p, head_dim)
        # Before the causal terms are added, d_x_dt is the part through the state.
        state_dot += tl.sum(d_x_dt * x, 1)
        grad = load_rows(grad_ptr, offs_q, mask_q, stride_grad, offs_p, head_dim)
        x_dot_grad += tl.sum(grad * x, 1)
        # A non-finite dy_i reaches its causal rows j by a masked sum, because the product would
        # spread it to other sequences.
        nan_pairs = tl.where(causal_mask(offs_q, seq_pos), nonfinite(grad)[:, None], 0.0)
        d_x_dt += tl.sum(nan_pairs, 0)[:, None]
        d_x_dt = product(tl.trans(score), finite(grad), d_x_dt, LOW_PREC, dot_dtype)
        dot += tl.sum(d_x_dt * x, 1)
        if d_x_ptr is not None:
            d_x = d_x_dt * dt[:, None] + grad * grad_scale[:, None]
            offs = (start * num_heads + pid_h) * head_dim
            offs += offs_q[:, None] * (num_heads * head_dim) + offs_p[None, :]
            mask = mask_q[:, None] & (offs_p < head_dim)[None, :]
            tl.store(d_x_ptr + offs, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)
    if dot_ptr is not None:
        tl.store(dot_ptr + offs_log, dot, mask=mask_q)
        tl.store(
            state_dot_ptr + tl.program_id(0), tl.sum(tl.where(reaches_end, state_dot * dt, 0.0), 0)
        )
    if d_D_ptr is not None:
        tl.store(d_D_ptr + tl.program_id(0), tl.sum(x_dot_grad, 0))


def ssd_scan_bwd(grad: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    """Launches the gradients that output_mask asks for, see `dragkit::ssd_scan_bwd`."""
    x, dt, A, B, C, D, seq_pos, output_mask = arguments
    out = empty_gradients((x, dt, A, B, C, D), output_mask)
    if x.numel() == 0:
        return tuple(t.zero_() for t in out)
    d_x, d_dt, d_A, d_B, d_C, d_D = (
        t if wanted else None for t, wanted in zip(out, output_mask, strict=True)
    )
    grad, C = row_strided(grad), row_strided(C)
    scan = ScanInputs.prepare(x, dt, A, B, seq_pos, scan_tile(grad, x, B, C))
    tile, x, B = scan.tile, scan.x, scan.B
    needs_dt = d_dt is not None or d_A is not None
    # The kernel of dt and A reads `dot` and `state_dot`, which the kernel of x writes.
    needs_x = d_x is not None or needs_dt or d_D is not None
    state = d_state = dot = state_dot = None
    if needs_dt or d_C is not None:
        state = chunk_states(scan)
    if needs_x or d_B is not None:
        d_state = chunk_states(scan._replace(x=grad, B=C), backward=True)
    sums = scan.log.new_empty(2, scan.num_chunks, x.shape[1])  # dA and dD per chunk
    sizes = (*scan.sizes, grad.stride(0), x.stride(0), B.stride(0), C.stride(0))
    grid = (scan.num_chunks * x.shape[1],)
    if needs_x:
        if needs_dt:
            dot = scan.log.new_empty(scan.log.shape)
            state_dot = scan.log.new_empty(scan.chunk_decay.shape)
        _ssd_scan_bwd_x_kernel[grid](
            *(grad, x, scan.dt, scan.log, B, C, D.contiguous(), scan.seq_pos, d_state),
            *(d_x, dot, state_dot, None if d_D is None else sums[1]),
            *sizes,
            **tile.options,
        )
    if needs_dt:
        _ssd_scan_bwd_dt_kernel[grid](
            *(grad, x, scan.dt, scan.A, scan.log, scan.chunk_decay, B, C, scan.seq_pos),
            *(state, d_state, dot, state_dot, d_dt, None if d_A is None else sums[0]),
            *sizes,
            DOT_BLOCK=DOT_BLOCK,
            **tile.options,
        )
    for d_bc, bc, boundary_state, of_b in ((d_B, C, d_state, 1), (d_C, B, state, 0)):
        if d_bc is not None and d_bc.numel() > 0:
            blocks = triton.cdiv(B.shape[2], tile.states)
            _ssd_scan_bwd_bc_kernel[scan.num_chunks * B.shape[1], blocks](
                *(grad, x, scan.dt, scan.log, bc, scan.seq_pos, boundary_state, d_bc),
                *(x.shape[0], B.shape[1], *sizes[2:7], bc.stride(0)),
                OF_B=of_b,
                **tile.options,
            )
    # One sum over chunks in a fixed order, instead of atomics.
    for d_head, total in ((d_A, sums[0]), (d_D, sums[1])):
        if d_head is not None:
            d_head.copy_(total.sum(0))
    return out


KERNELS = tuple(
    spec(_ssd_scan_bwd_x_kernel, GRADIENT_LIMITS[tile], tile=tile, dtype=dtype)
    for dtype, tile in TILES.items()
)
