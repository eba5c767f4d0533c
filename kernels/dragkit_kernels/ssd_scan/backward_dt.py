"""Triton kernel of the gradients of dt and A."""

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import spec
from .decays import (
    GRADIENT_LIMITS,
    LOG2_E,
    LOWEST_LOG,
    TILES,
    causal_mask,
    chunk_rows,
    finite,
    load_rows,
    load_state,
    product,
    scores,
)

# Elements of a state and its gradient that are multiplied at a time.
DOT_BLOCK = 1024


@triton.jit(do_not_specialize=["num_rows", "num_heads", "heads_per_group"])
def _ssd_scan_bwd_dt_kernel(
    grad_ptr, x_ptr, dt_ptr, A_ptr, log_ptr, chunk_decay_ptr, B_ptr, C_ptr, seq_pos_ptr, state_ptr,
    d_state_ptr, dot_ptr, state_dot_ptr,
    d_dt_ptr, d_A_ptr,
    num_rows, num_heads, heads_per_group, head_dim, state_dim,
    stride_grad, stride_x, stride_B, stride_C,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, LOW_PREC: tl.constexpr,
    DOT_BLOCK: tl.constexpr,
):  # fmt: skip
    """d_dt_t = A d_log_t + dot_t + (C_t . B_t) (x_t . dy_t), d_A = sum_t dt_t d_log_t per chunk.

    d_log_t is the gradient of the logarithm A dt_t. Every decay from row j to row i with
    i >= t > j contains it. So d_log_t sums (row sums - column sums) over the rows from t to the end
    of its sequence in the chunk, plus the terms of the state that leaves the chunk.
    One program per chunk and head.
    """
    pid_h, chunk = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    start, offs_q, mask_q, seq_pos, last_pos = chunk_rows(seq_pos_ptr, chunk, num_rows, Q)
    dot_dtype = x_ptr.dtype.element_ty
    B_ptr += start * stride_B + pid_h // heads_per_group * state_dim
    C_ptr += start * stride_C + pid_h // heads_per_group * state_dim
    state_ptr += tl.program_id(0).to(tl.int64) * head_dim * state_dim
    d_state_ptr += tl.program_id(0).to(tl.int64) * head_dim * state_dim
    offs_log = pid_h.to(tl.int64) * num_rows + start + offs_q
    log = tl.load(log_ptr + offs_log, mask=mask_q, other=0.0)
    offs_dt = start * num_heads + pid_h + offs_q * num_heads
    dt = tl.load(dt_ptr + offs_dt, mask=mask_q, other=0.0)
    score, diagonal = scores(
        B_ptr, C_ptr, log, offs_q, mask_q, seq_pos, state_dim, stride_B, stride_C,
        dot_dtype, Q, BLOCK_N, LOW_PREC,
    )  # fmt: skip
    x_dot_grad = tl.zeros((Q,), tl.float32)
    d_log = x_dot_grad
    d_log_pairs = x_dot_grad
    grad_ptr += start * stride_grad + pid_h * head_dim
    x_ptr += start * stride_x + pid_h * head_dim
    for start_p in tl.range(0, head_dim, BLOCK_P, num_stages=1):
        offs_p = start_p + tl.arange(0, BLOCK_P)
        C_dot_state = tl.zeros((Q, BLOCK_P), tl.float32)
        for start_n in tl.range(0, state_dim, BLOCK_N, num_stages=1):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            C = load_rows(C_ptr, offs_q, mask_q, stride_C, offs_n, state_dim)
            state = load_state(state_ptr, offs_p, head_dim, offs_n, state_dim)
            C_dot_state = product(C, tl.trans(state), C_dot_state, LOW_PREC, dot_dtype)
        grad = load_rows(grad_ptr, offs_q, mask_q, stride_grad, offs_p, head_dim)
        d_log += tl.sum(C_dot_state * grad, 1)
        x = load_rows(x_ptr, offs_q, mask_q, stride_x, offs_p, head_dim)
        x_dot_grad += tl.sum(grad * x, 1)
        # A non-finite row already makes its `dot` NaN. Here it would reach other sequences.
        grad_dot_x = tl.zeros((Q, Q), tl.float32)
        grad_dot_x = product(finite(grad), tl.trans(finite(x)), grad_dot_x, LOW_PREC, dot_dtype)
        d_log_pairs += tl.sum(score * grad_dot_x * finite(dt)[None, :], 1)
    # Terms of the entering state. Select: it may be NaN because of another sequence.
    d_log = tl.where(seq_pos > offs_q, d_log * tl.exp2(log), 0.0)
    d_log += d_log_pairs
    dot = tl.load(dot_ptr + offs_log, mask=mask_q, other=0.0)
    # Column sums: the decays from row j shrink when log_j grows.
    d_log -= dt * dot
    # log_i sums over the rows up to i of its sequence, so a row's gradient sums over i from it on.
    d_log = tl.sum(tl.where(causal_mask(offs_q, seq_pos), d_log[:, None], 0.0), 0)
    state_product = tl.zeros((DOT_BLOCK,), tl.float32)
    # S . dS in blocks, because a whole state does not fit into registers.
    for start_n in range(0, head_dim * state_dim, DOT_BLOCK):
        offs = start_n + tl.arange(0, DOT_BLOCK)
        mask = offs < head_dim * state_dim
        state = tl.load(state_ptr + offs, mask=mask, other=0.0)
        state_product = tl.fma(
            state, tl.load(d_state_ptr + offs, mask=mask, other=0.0), state_product
        )
    chunk_decay = tl.load(chunk_decay_ptr + pid_h * (tl.num_programs(0) // num_heads) + chunk)
    # -1 marks a chunk in which a sequence begins: no state passes through it.
    d_log_end = tl.where(chunk_decay < 0.0, 0.0, tl.sum(state_product, 0) * chunk_decay)
    d_log_end += tl.load(state_dot_ptr + tl.program_id(0))
    d_log += tl.where(Q - 1 - offs_q <= last_pos, d_log_end, 0.0)
    A = tl.load(A_ptr + pid_h).to(tl.float32)
    # A clamped logarithm does not depend on dt.
    d_log = tl.where(dt * A * LOG2_E < LOWEST_LOG, 0.0, d_log)
    if d_dt_ptr is not None:
        tl.store(d_dt_ptr + offs_dt, d_log * A + dot + diagonal * x_dot_grad, mask=mask_q)
    if d_A_ptr is not None:
        tl.store(d_A_ptr + tl.program_id(0), tl.sum(tl.where(mask_q, d_log * dt, 0.0), 0))


KERNELS = tuple(
    spec(
        _ssd_scan_bwd_dt_kernel,
        GRADIENT_LIMITS[tile],
        tile=tile,
        dtype=dtype,
        constants={"DOT_BLOCK": DOT_BLOCK},
    )
    for dtype, tile in TILES.items()
)
