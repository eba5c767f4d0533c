"""Triton kernel of the gradients of a group's maps."""

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import spec
from .decays import (
    causal_mask,
    chunk_rows,
    decay,
    finite,
    load_rows,
    load_state,
    nonfinite,
    product,
)
from .tiles import GRADIENT_BUDGETS, TILES


@triton.jit(do_not_specialize=["num_rows", "num_groups", "heads"])
def _ssd_scan_bwd_maps_kernel(
    grad_ptr,
    x_ptr,
    dt_ptr,
    log_ptr,
    map_ptr,
    seq_pos_ptr,
    state_ptr,
    d_map_ptr,
    num_rows,
    num_groups,
    heads,
    num_width,
    num_states,
    stride_grad,
    stride_x,
    stride_map,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOW: tl.constexpr,
    OF_B: tl.constexpr,
):
    """Gradient of B (OF_B) or C for the rows of a chunk and a group, over its heads in
    order; `map` is the other one.

    d_B_j = sum_i d_ij C_i + sum_h dt_j exp(log_end - log_j) x_j dS and
    d_C_i = sum_j d_ij B_j + sum_h exp(log_i) dy_i S with
    d_ij = sum_h exp(log_i - log_j) dt_j (dy_i . x_j).
    """
    group, chunk = tl.program_id(0) % num_groups, tl.program_id(0) // num_groups
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first, offs_q, live, seq_pos, last = chunk_rows(seq_pos_ptr, chunk, num_rows, Q)
    kind = x_ptr.dtype.element_ty
    num_heads = num_groups * heads
    # Rows that take part in the state at the chunk's end, or in that at its start.
    joins = live & (Q - 1 - offs_q <= last) if OF_B else live & (seq_pos > offs_q)
    d_score = tl.zeros((Q, Q), tl.float32)
    d_map = tl.zeros((Q, BLOCK_N), tl.float32)
    for r in tl.range(0, heads, num_stages=1):
        head = group * heads + r
        log_at = log_ptr + head.to(tl.int64) * num_rows + first
        log = tl.load(log_at + offs_q, mask=live, other=0.0)
        dt = tl.load(dt_ptr + first * num_heads + head + offs_q * num_heads, mask=live, other=0.0)
        if OF_B:
            whole = tl.sum(tl.where(offs_q == Q - 1, log, 0.0), 0)
            weight = tl.exp2(tl.where(joins, whole - log, 0.0)) * dt
        else:
            weight = tl.exp2(log)
        state_at = state_ptr + (chunk.to(tl.int64) * num_heads + head) * num_width * num_states
        grad_at = grad_ptr + first * stride_grad + head * num_width
        x_at = x_ptr + first * stride_x + head * num_width
        d_seen = tl.zeros((Q, Q), tl.float32)
        for begin in tl.range(0, num_width, BLOCK_P, num_stages=1):
            offs_p = begin + tl.arange(0, BLOCK_P)
            grad = load_rows(grad_at, offs_q, live, stride_grad, offs_p, num_width)
            x = load_rows(x_at, offs_q, live, stride_x, offs_p, num_width)
            d_seen = product(grad, tl.trans(x), d_seen, LOW, kind)
            state = load_state(state_at, offs_p, num_width, offs_n, num_states)
            rows = x if OF_B else grad
            d_map = product(rows * weight[:, None], state, d_map, LOW, kind)
        seen = causal_mask(offs_q, seq_pos)
        d_score += tl.where(seen, d_seen * decay(log, seen) * dt[None, :], 0.0)
    map_ptr += first * stride_map + group * num_states
    other = load_rows(map_ptr, offs_q, live, stride_map, offs_n, num_states)
    # What is not finite acts by the weights, which the mask holds.
    d_map = tl.where(joins[:, None], d_map, 0.0)
    if OF_B:
        d_score = tl.where(causal_mask(offs_q, seq_pos), d_score + nonfinite(other)[:, None], 0.0)
        d_map = product(tl.trans(d_score), finite(other), d_map, LOW, kind)
    else:
        d_score = tl.where(causal_mask(offs_q, seq_pos), d_score + nonfinite(other)[None, :], 0.0)
        d_map = product(d_score, finite(other), d_map, LOW, kind)
    d_map_ptr += (first * num_groups + group) * num_states
    at = offs_q[:, None] * (num_groups * num_states) + offs_n[None, :]
    mask = live[:, None] & (offs_n < num_states)[None, :]
    tl.store(d_map_ptr + at, d_map.to(d_map_ptr.dtype.element_ty), mask=mask)


KERNELS = tuple(
    spec(
        _ssd_scan_bwd_maps_kernel,
        GRADIENT_BUDGETS[tile],
        tile=tile,
        dtype=dtype,
        constants={"OF_B": of_b},
    )
    for of_b in (1, 0)
    for dtype, tile in TILES.items()
)
