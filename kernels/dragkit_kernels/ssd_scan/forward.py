"""Triton forward of the scan: the output of every chunk, and single states."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Budget, row_strided, spec
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
from .states import Scan, chunk_states
from .tiles import TILES, scan_tile


@triton.jit(do_not_specialize=["num_rows", "num_heads", "heads"])
def _ssd_scan_fwd_output_kernel(
    x_ptr,
    dt_ptr,
    log_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    seq_pos_ptr,
    state_ptr,
    y_ptr,
    num_rows,
    num_heads,
    heads,
    num_width,
    num_states,
    stride_x,
    stride_B,
    stride_C,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOW: tl.constexpr,
):
    """y_i = exp(log_i) state C_i + sum_j exp(log_i - log_j) (C_i . B_j) dt_j x_j
    + D x_i for the rows i of a chunk and a head, with the state before the chunk."""
    pid_h, chunk = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    first, offs_q, live, seq_pos, _ = chunk_rows(seq_pos_ptr, chunk, num_rows, Q)
    kind = x_ptr.dtype.element_ty
    state_ptr += tl.program_id(0).to(tl.int64) * num_width * num_states
    B_ptr += first * stride_B + pid_h // heads * num_states
    C_ptr += first * stride_C + pid_h // heads * num_states
    y = tl.zeros((Q, BLOCK_P), tl.float32)
    score = tl.zeros((Q, Q), tl.float32)
    for start in tl.range(0, num_states, BLOCK_N, num_stages=1):
        offs_n = start + tl.arange(0, BLOCK_N)
        C = load_rows(C_ptr, offs_q, live, stride_C, offs_n, num_states)
        B = load_rows(B_ptr, offs_q, live, stride_B, offs_n, num_states)
        score = product(C, tl.trans(B), score, LOW, kind)
        state = load_state(state_ptr, offs_p, num_width, offs_n, num_states)
        y = product(C, tl.trans(state), y, LOW, kind)
    log = tl.load(log_ptr + pid_h.to(tl.int64) * num_rows + first + offs_q, mask=live, other=0.0)
    dt_ptr += first * num_heads + pid_h
    dt = tl.load(dt_ptr + offs_q * num_heads, mask=live, other=0.0)
    # Where a row does not see the state, that may be NaN.
    y = tl.where((seq_pos > offs_q)[:, None], y * tl.exp2(log)[:, None], 0.0)
    x_ptr += first * stride_x + pid_h * num_width
    x = load_rows(x_ptr, offs_q, live, stride_x, offs_p, num_width)
    seen = causal_mask(offs_q, seq_pos)
    # Rows that are not finite act by their weights, which the mask holds, instead of their values.
    weight = score * decay(log, seen) * dt[None, :] + nonfinite(x)[None, :]
    y = product(tl.where(seen, weight, 0.0), finite(x), y, LOW, kind)
    y = tl.fma(x, tl.load(D_ptr + pid_h).to(tl.float32) + tl.zeros_like(x), y)
    y_ptr += (first * num_heads + pid_h) * num_width
    at = offs_q[:, None] * (num_heads * num_width) + offs_p[None, :]
    mask = live[:, None] & (offs_p < num_width)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


def ssd_scan_fwd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, seq_pos: Tensor
) -> Tensor:
    """Launches the scan; see `dragkit::ssd_scan_fwd`."""
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    C = row_strided(C)
    scan = Scan.of(x, dt, A, B, seq_pos, scan_tile(x, B, C))
    state = chunk_states(scan)
    blocks = triton.cdiv(x.shape[2], scan.tile.width)
    _ssd_scan_fwd_output_kernel[(scan.num_chunks * x.shape[1], blocks)](
        *(scan.x, scan.dt, scan.log, scan.B, C, D.contiguous(), scan.seq_pos, state, y),
        *(*scan.sizes, scan.x.stride(0), scan.B.stride(0), C.stride(0)),
        **scan.tile.for_output.options,
    )
    return y


@triton.jit(do_not_specialize=["num_rows", "num_heads", "heads"])
def _ssd_state_fwd_kernel(
    x_ptr,
    dt_ptr,
    log_ptr,
    B_ptr,
    seq_pos_ptr,
    state_ptr,
    last_ptr,
    out_ptr,
    num_rows,
    num_heads,
    heads,
    num_width,
    num_states,
    stride_x,
    stride_B,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOW: tl.constexpr,
):
    """out[s, h] = the state of a head after row last_s: that before the row's chunk, decayed, and
    what the rows up to it add."""
    pid_h, pid_s = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(last_ptr + pid_s)
    chunk, place = end // Q, end % Q
    offs_q, first = tl.arange(0, Q), chunk * Q
    length = tl.load(seq_pos_ptr + end)
    live = (offs_q <= place) & (place - offs_q <= length)
    log_ptr += pid_h.to(tl.int64) * num_rows
    log = tl.load(log_ptr + first + offs_q, mask=live, other=0.0)
    whole = tl.load(log_ptr + end)
    dt_ptr += first * num_heads + pid_h
    dt = tl.load(dt_ptr + offs_q * num_heads, mask=live, other=0.0)
    weight = tl.exp2(tl.where(live, whole - log, 0.0)) * dt
    x_ptr += first * stride_x + pid_h * num_width
    x = load_rows(x_ptr, offs_q, live, stride_x, offs_p, num_width)
    B_ptr += first * stride_B + pid_h // heads * num_states
    B = load_rows(B_ptr, offs_q, live, stride_B, offs_n, num_states)
    x = tl.where(live[:, None], x * weight[:, None], 0.0)
    state_ptr += (chunk * num_heads + pid_h) * num_width * num_states
    state = load_state(state_ptr, offs_p, num_width, offs_n, num_states)
    state = tl.where(length > place, state * tl.exp2(whole), 0.0)
    state = product(tl.trans(x), B, state, LOW, x_ptr.dtype.element_ty)
    out_ptr += tl.program_id(0).to(tl.int64) * num_width * num_states
    mask = (offs_p < num_width)[:, None] & (offs_n < num_states)[None, :]
    tl.store(out_ptr + offs_p[:, None] * num_states + offs_n[None, :], state, mask=mask)


def ssd_state_fwd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, seq_pos: Tensor, last: Tensor
) -> Tensor:
    """Launches the states at the rows of `last`; see `dragkit::ssd_state_fwd`."""
    _, num_heads, num_width = x.shape
    out = x.new_empty(last.shape[0], num_heads, num_width, B.shape[2], dtype=torch.float32)
    if out.numel() == 0:
        return out
    scan = Scan.of(x, dt, A, B, seq_pos, scan_tile(x, B))
    state, tile = chunk_states(scan), scan.tile
    blocks = triton.cdiv(num_width, tile.width), triton.cdiv(B.shape[2], tile.states)
    _ssd_state_fwd_kernel[(last.shape[0] * num_heads, *blocks)](
        *(scan.x, scan.dt, scan.log, scan.B, scan.seq_pos, state, last.contiguous(), out),
        *(*scan.sizes, scan.x.stride(0), scan.B.stride(0)),
        **tile.options,
    )
    return out


_BUDGET = Budget(registers=168, shared=32768)
KERNELS = (
    *(
        spec(_ssd_scan_fwd_output_kernel, _BUDGET, tile=tile.for_output, dtype=dtype)
        for dtype, tile in TILES.items()
    ),
    *(
        spec(_ssd_state_fwd_kernel, _BUDGET, tile=tile, dtype=dtype, out_ptr="*fp32")
        for dtype, tile in TILES.items()
    ),
)
