"""Triton kernel of the gradients of steps and rates."""

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import spec
from .decays import (
    LOG2_E,
    LOWEST_LOG,
    causal_mask,
    chunk_rows,
    finite,
    load_rows,
    load_state,
    product,
    scores,
)
from .tiles import GRADIENT_BUDGETS, TILES

# Elements of two states multiplied at a time.
DOT_BLOCK = 1024


@triton.jit(do_not_specialize=["num_rows", "num_heads", "heads"])
def _ssd_scan_bwd_steps_kernel(
    grad_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    log_ptr,
    chunk_decay_ptr,
    B_ptr,
    C_ptr,
    seq_pos_ptr,
    state_ptr,
    d_state_ptr,
    dot_ptr,
    state_dot_ptr,
    d_dt_ptr,
    d_A_ptr,
    num_rows,
    num_heads,
    heads,
    num_width,
    num_states,
    stride_grad,
    stride_x,
    stride_B,
    stride_C,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOW: tl.constexpr,
    DOT_BLOCK: tl.constexpr,
):
    """Gradient of dt for the rows of a chunk and a head, A d_log_t + dot_t +
    (C_t . B_t) (x_t . dy_t), and the chunk's part of that of A, sum_t dt_t d_log_t.

    d_log_t, of the logarithm of a decay, is what all pairs i >= t > j give: sums of rows i less
    sums of columns j, over the rows from t to the end of its sequence in the chunk, and what leaves
    the chunk.
    """
    pid_h, chunk = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    first, offs_q, live, seq_pos, last = chunk_rows(seq_pos_ptr, chunk, num_rows, Q)
    kind = x_ptr.dtype.element_ty
    B_ptr += first * stride_B + pid_h // heads * num_states
    C_ptr += first * stride_C + pid_h // heads * num_states
    state_ptr += tl.program_id(0).to(tl.int64) * num_width * num_states
    d_state_ptr += tl.program_id(0).to(tl.int64) * num_width * num_states
    at_log = pid_h.to(tl.int64) * num_rows + first + offs_q
    log = tl.load(log_ptr + at_log, mask=live, other=0.0)
    at_dt = first * num_heads + pid_h + offs_q * num_heads
    dt = tl.load(dt_ptr + at_dt, mask=live, other=0.0)
    score, own = scores(
        B_ptr, C_ptr, log, offs_q, live, seq_pos, num_states, stride_B, stride_C,
        kind, Q, BLOCK_N, LOW,
    )  # fmt: skip
    x_grad = tl.zeros((Q,), tl.float32)
    d_log = x_grad
    pairs = x_grad
    grad_ptr += first * stride_grad + pid_h * num_width
    x_ptr += first * stride_x + pid_h * num_width
    for begin in tl.range(0, num_width, BLOCK_P, num_stages=1):
        offs_p = begin + tl.arange(0, BLOCK_P)
        read = tl.zeros((Q, BLOCK_P), tl.float32)
        for start in tl.range(0, num_states, BLOCK_N, num_stages=1):
            offs_n = start + tl.arange(0, BLOCK_N)
            C = load_rows(C_ptr, offs_q, live, stride_C, offs_n, num_states)
            state = load_state(state_ptr, offs_p, num_width, offs_n, num_states)
            read = product(C, tl.trans(state), read, LOW, kind)
        grad = load_rows(grad_ptr, offs_q, live, stride_grad, offs_p, num_width)
        d_log += tl.sum(read * grad, 1)
        x = load_rows(x_ptr, offs_q, live, stride_x, offs_p, num_width)
        x_grad += tl.sum(grad * x, 1)
        # Rows that are not finite have spoiled `dot`: here they would spoil others.
        d_seen = tl.zeros((Q, Q), tl.float32)
        d_seen = product(finite(grad), tl.trans(finite(x)), d_seen, LOW, kind)
        pairs += tl.sum(score * d_seen * finite(dt)[None, :], 1)
    d_log = tl.where(seq_pos > offs_q, d_log * tl.exp2(log), 0.0)
    d_log += pairs
    dot = tl.load(dot_ptr + at_log, mask=live, other=0.0)
    d_log -= dt * dot
    d_log = tl.sum(tl.where(causal_mask(offs_q, seq_pos), d_log[:, None], 0.0), 0)
    passed = tl.zeros((DOT_BLOCK,), tl.float32)
    for start in range(0, num_width * num_states, DOT_BLOCK):
        at = start + tl.arange(0, DOT_BLOCK)
        mask = at < num_width * num_states
        state = tl.load(state_ptr + at, mask=mask, other=0.0)
        passed = tl.fma(state, tl.load(d_state_ptr + at, mask=mask, other=0.0), passed)
    chunk_decay = tl.load(chunk_decay_ptr + pid_h * (tl.num_programs(0) // num_heads) + chunk)
    leaving = tl.where(chunk_decay < 0.0, 0.0, tl.sum(passed, 0) * chunk_decay)
    leaving += tl.load(state_dot_ptr + tl.program_id(0))
    d_log += tl.where(Q - 1 - offs_q <= last, leaving, 0.0)
    A = tl.load(A_ptr + pid_h).to(tl.float32)
    # At the lowest decay a change of the step makes none.
    d_log = tl.where(dt * A * LOG2_E < LOWEST_LOG, 0.0, d_log)
    if d_dt_ptr is not None:
        tl.store(d_dt_ptr + at_dt, d_log * A + dot + own * x_grad, mask=live)
    if d_A_ptr is not None:
        tl.store(d_A_ptr + tl.program_id(0), tl.sum(tl.where(live, d_log * dt, 0.0), 0))


KERNELS = tuple(
    spec(
        _ssd_scan_bwd_steps_kernel,
        GRADIENT_BUDGETS[tile],
        tile=tile,
        dtype=dtype,
        constants={"DOT_BLOCK": DOT_BLOCK},
    )
    for dtype, tile in TILES.items()
)
