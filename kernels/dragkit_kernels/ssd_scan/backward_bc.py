"""Triton kernel of the gradients of B and C."""

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import spec
from .decays import (
    GRADIENT_LIMITS,
    TILES,
    causal_mask,
    chunk_rows,
    decay,
    finite,
    load_rows,
    load_state,
    nonfinite,
    product,
)


@triton.jit(do_not_specialize=["num_rows", "num_groups", "heads_per_group"])
def _ssd_scan_bwd_bc_kernel(
    grad_ptr, x_ptr, dt_ptr, log_ptr, bc_ptr, seq_pos_ptr, state_ptr,
    d_bc_ptr,
    num_rows, num_groups, heads_per_group, head_dim, state_dim,
    stride_grad, stride_x, stride_bc,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, LOW_PREC: tl.constexpr,
    OF_B: tl.constexpr,
):  # fmt: skip
    """d_bc is dB and bc is C with OF_B, else d_bc is dC and bc is B.

    dB_j = sum_i d_ij C_i + sum_h dt_j exp(log_end - log_j) x_j dS and
    dC_i = sum_j d_ij B_j + sum_h exp(log_i) dy_i S with
    d_ij = sum_h exp(log_i - log_j) dt_j (dy_i . x_j).
    One program per chunk, group and BLOCK_N columns. It adds the heads of the group in order.
    """
    group, chunk = tl.program_id(0) % num_groups, tl.program_id(0) // num_groups
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start, offs_q, mask_q, seq_pos, last_pos = chunk_rows(seq_pos_ptr, chunk, num_rows, Q)
    dot_dtype = x_ptr.dtype.element_ty
    num_heads = num_groups * heads_per_group
    # Rows of the sequence that reaches the chunk's end (dB), or that enters at its start (dC).
    reaches_state = mask_q & (Q - 1 - offs_q <= last_pos) if OF_B else mask_q & (seq_pos > offs_q)
    d_score = tl.zeros((Q, Q), tl.float32)
    d_bc = tl.zeros((Q, BLOCK_N), tl.float32)
    # One program adds all heads of a group in order, instead of atomics.
    for r in tl.range(0, heads_per_group, num_stages=1):
        head = group * heads_per_group + r
        log_base = log_ptr + head.to(tl.int64) * num_rows + start
        log = tl.load(log_base + offs_q, mask=mask_q, other=0.0)
        dt = tl.load(dt_ptr + start * num_heads + head + offs_q * num_heads, mask=mask_q, other=0.0)
        if OF_B:
            log_end = tl.sum(tl.where(offs_q == Q - 1, log, 0.0), 0)
            weight = tl.exp2(tl.where(reaches_state, log_end - log, 0.0)) * dt
        else:
            weight = tl.exp2(log)
        state_base = state_ptr + (chunk.to(tl.int64) * num_heads + head) * head_dim * state_dim
        grad_base = grad_ptr + start * stride_grad + head * head_dim
        x_base = x_ptr + start * stride_x + head * head_dim
        grad_dot_x = tl.zeros((Q, Q), tl.float32)
        for start_p in tl.range(0, head_dim, BLOCK_P, num_stages=1):
            offs_p = start_p + tl.arange(0, BLOCK_P)
            grad = load_rows(grad_base, offs_q, mask_q, stride_grad, offs_p, head_dim)
            x = load_rows(x_base, offs_q, mask_q, stride_x, offs_p, head_dim)
            grad_dot_x = product(grad, tl.trans(x), grad_dot_x, LOW_PREC, dot_dtype)
            state = load_state(state_base, offs_p, head_dim, offs_n, state_dim)
            operand = x if OF_B else grad
            d_bc = product(operand * weight[:, None], state, d_bc, LOW_PREC, dot_dtype)
        causal = causal_mask(offs_q, seq_pos)
        d_score += tl.where(causal, grad_dot_x * decay(log, causal) * dt[None, :], 0.0)
    bc_ptr += start * stride_bc + group * state_dim
    bc = load_rows(bc_ptr, offs_q, mask_q, stride_bc, offs_n, state_dim)
    # A non-finite row enters through the masked d_score, so that it cannot reach other sequences.
    d_bc = tl.where(reaches_state[:, None], d_bc, 0.0)
    if OF_B:
        d_score = tl.where(causal_mask(offs_q, seq_pos), d_score + nonfinite(bc)[:, None], 0.0)
        d_bc = product(tl.trans(d_score), finite(bc), d_bc, LOW_PREC, dot_dtype)
    else:
        d_score = tl.where(causal_mask(offs_q, seq_pos), d_score + nonfinite(bc)[None, :], 0.0)
        d_bc = product(d_score, finite(bc), d_bc, LOW_PREC, dot_dtype)
    d_bc_ptr += (start * num_groups + group) * state_dim
    offs = offs_q[:, None] * (num_groups * state_dim) + offs_n[None, :]
    mask = mask_q[:, None] & (offs_n < state_dim)[None, :]
    tl.store(d_bc_ptr + offs, d_bc.to(d_bc_ptr.dtype.element_ty), mask=mask)


KERNELS = tuple(
    spec(
        _ssd_scan_bwd_bc_kernel,
        GRADIENT_LIMITS[tile],
        tile=tile,
        dtype=dtype,
        constants={"OF_B": of_b},
    )
    for of_b in (1, 0)
    for dtype, tile in TILES.items()
)
