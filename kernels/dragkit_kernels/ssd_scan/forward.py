"""Triton forward of ssd_scan, and ssd_state."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import ResourceLimits, row_strided, spec
from .decays import (
    TILES,
    causal_mask,
    chunk_rows,
    decay,
    finite,
    load_rows,
    load_state,
    nonfinite,
    product,
    scan_tile,
)
from .states import ScanInputs, chunk_states


@triton.jit(do_not_specialize=["num_rows", "num_heads", "heads_per_group"])
def _ssd_scan_fwd_output_kernel(
    x_ptr, dt_ptr, log_ptr, B_ptr, C_ptr, D_ptr, seq_pos_ptr, state_ptr,
    y_ptr,
    num_rows, num_heads, heads_per_group, head_dim, state_dim,
    stride_x, stride_B, stride_C,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, LOW_PREC: tl.constexpr,
):  # fmt: skip
    """y_i = exp(log_i) S C_i + sum_j exp(log_i - log_j) (C_i . B_j) dt_j x_j + D x_i.

    S is the state before the chunk. One program per chunk, head and BLOCK_P columns.
    """
    pid_h, chunk = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    start, offs_q, mask_q, seq_pos, _ = chunk_rows(seq_pos_ptr, chunk, num_rows, Q)
    dot_dtype = x_ptr.dtype.element_ty
    state_ptr += tl.program_id(0).to(tl.int64) * head_dim * state_dim
    B_ptr += start * stride_B + pid_h // heads_per_group * state_dim
    C_ptr += start * stride_C + pid_h // heads_per_group * state_dim
    y = tl.zeros((Q, BLOCK_P), tl.float32)
    score = tl.zeros((Q, Q), tl.float32)
    # Each block of C serves the scores and the product with the state.
    for start_n in tl.range(0, state_dim, BLOCK_N, num_stages=1):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        C = load_rows(C_ptr, offs_q, mask_q, stride_C, offs_n, state_dim)
        B = load_rows(B_ptr, offs_q, mask_q, stride_B, offs_n, state_dim)
        score = product(C, tl.trans(B), score, LOW_PREC, dot_dtype)
        state = load_state(state_ptr, offs_p, head_dim, offs_n, state_dim)
        y = product(C, tl.trans(state), y, LOW_PREC, dot_dtype)
    log = tl.load(log_ptr + pid_h.to(tl.int64) * num_rows + start + offs_q, mask=mask_q, other=0.0)
    dt_ptr += start * num_heads + pid_h
    dt = tl.load(dt_ptr + offs_q * num_heads, mask=mask_q, other=0.0)
    # Select: the state may be NaN for rows whose sequence begins in this chunk.
    y = tl.where((seq_pos > offs_q)[:, None], y * tl.exp2(log)[:, None], 0.0)
    x_ptr += start * stride_x + pid_h * head_dim
    x = load_rows(x_ptr, offs_q, mask_q, stride_x, offs_p, head_dim)
    causal = causal_mask(offs_q, seq_pos)
    # A non-finite row enters through its masked weights, so that it cannot reach other sequences.
    weight = score * decay(log, causal) * dt[None, :] + nonfinite(x)[None, :]
    y = product(tl.where(causal, weight, 0.0), finite(x), y, LOW_PREC, dot_dtype)
    y = tl.fma(x, tl.load(D_ptr + pid_h).to(tl.float32) + tl.zeros_like(x), y)
    y_ptr += (start * num_heads + pid_h) * head_dim
    offs = offs_q[:, None] * (num_heads * head_dim) + offs_p[None, :]
    mask = mask_q[:, None] & (offs_p < head_dim)[None, :]
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def ssd_scan_fwd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, seq_pos: Tensor
) -> Tensor:
    """Launches the scan with the arguments of `dragkit::ssd_scan_fwd`."""
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    C = row_strided(C)
    scan = ScanInputs.prepare(x, dt, A, B, seq_pos, scan_tile(x, B, C))
    state = chunk_states(scan)
    blocks = triton.cdiv(x.shape[2], scan.tile.width)
    _ssd_scan_fwd_output_kernel[(scan.num_chunks * x.shape[1], blocks)](
        *(scan.x, scan.dt, scan.log, scan.B, C, D.contiguous(), scan.seq_pos, state, y),
        *(*scan.sizes, scan.x.stride(0), scan.B.stride(0), C.stride(0)),
        **scan.tile.for_output.options,
    )
    return y


@triton.jit(do_not_specialize=["num_rows", "num_heads", "heads_per_group"])
def _ssd_state_fwd_kernel(
    x_ptr, dt_ptr, log_ptr, B_ptr, seq_pos_ptr, state_ptr, last_row_ptr,
    out_ptr,
    num_rows, num_heads, heads_per_group, head_dim, state_dim,
    stride_x, stride_B,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, LOW_PREC: tl.constexpr,
):  # fmt: skip
    """out[s, h] = exp(log_l) S + sum_j exp(log_l - log_j) dt_j x_j B_j^T for row l = last_row[s].

    S is the state before the chunk of row l, and j runs over the rows of its sequence in the chunk
    up to l. One program per wanted row, head and block of the state.
    """
    pid_h, pid_s = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    last_row = tl.load(last_row_ptr + pid_s)
    chunk, last_q = last_row // Q, last_row % Q
    offs_q, start = tl.arange(0, Q), chunk * Q
    last_pos = tl.load(seq_pos_ptr + last_row)
    mask_q = (offs_q <= last_q) & (last_q - offs_q <= last_pos)
    log_ptr += pid_h.to(tl.int64) * num_rows
    log = tl.load(log_ptr + start + offs_q, mask=mask_q, other=0.0)
    log_end = tl.load(log_ptr + last_row)
    dt_ptr += start * num_heads + pid_h
    dt = tl.load(dt_ptr + offs_q * num_heads, mask=mask_q, other=0.0)
    weight = tl.exp2(tl.where(mask_q, log_end - log, 0.0)) * dt
    x_ptr += start * stride_x + pid_h * head_dim
    x = load_rows(x_ptr, offs_q, mask_q, stride_x, offs_p, head_dim)
    B_ptr += start * stride_B + pid_h // heads_per_group * state_dim
    B = load_rows(B_ptr, offs_q, mask_q, stride_B, offs_n, state_dim)
    x = tl.where(mask_q[:, None], x * weight[:, None], 0.0)
    state_ptr += (chunk * num_heads + pid_h) * head_dim * state_dim
    state = load_state(state_ptr, offs_p, head_dim, offs_n, state_dim)
    state = tl.where(last_pos > last_q, state * tl.exp2(log_end), 0.0)
    state = product(tl.trans(x), B, state, LOW_PREC, x_ptr.dtype.element_ty)
    out_ptr += tl.program_id(0).to(tl.int64) * head_dim * state_dim
    mask = (offs_p < head_dim)[:, None] & (offs_n < state_dim)[None, :]
    tl.store(out_ptr + offs_p[:, None] * state_dim + offs_n[None, :], state, mask=mask)


def ssd_state_fwd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, seq_pos: Tensor, last_row: Tensor
) -> Tensor:
    """Launches the states with the arguments of `dragkit::ssd_state_fwd`."""
    _, num_heads, head_dim = x.shape
    out = x.new_empty(last_row.shape[0], num_heads, head_dim, B.shape[2], dtype=torch.float32)
    if out.numel() == 0:
        return out
    scan = ScanInputs.prepare(x, dt, A, B, seq_pos, scan_tile(x, B))
    state, tile = chunk_states(scan), scan.tile
    blocks = triton.cdiv(head_dim, tile.width), triton.cdiv(B.shape[2], tile.states)
    _ssd_state_fwd_kernel[(last_row.shape[0] * num_heads, *blocks)](
        *(scan.x, scan.dt, scan.log, scan.B, scan.seq_pos, state, last_row.contiguous(), out),
        *(*scan.sizes, scan.x.stride(0), scan.B.stride(0)),
        **tile.options,
    )
    return out


_LIMITS = ResourceLimits(registers=168, shared_bytes=32768)
KERNELS = (
    *(
        spec(_ssd_scan_fwd_output_kernel, _LIMITS, tile=tile.for_output, dtype=dtype)
        for dtype, tile in TILES.items()
    ),
    *(
        spec(_ssd_state_fwd_kernel, _LIMITS, tile=tile, dtype=dtype, out_ptr="*fp32")
        for dtype, tile in TILES.items()
    ),
)
