"""Triton forward of the scan: the output of every chunk, and single states."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Budget, spec
from .decays import (
    chunk_rows,
    decay_logs,
    finite,
    flaw,
    kept,
    load_rows,
    load_state,
    product,
    sees,
)
from .states import chunk_states
from .tiles import TILES, rows_of, scan_tile


@triton.jit(do_not_specialize=["num_rows", "num_heads", "heads"])
def _ssd_scan_fwd_output_kernel(
    x_ptr,
    dt_ptr,
    log_ptr,
    into_ptr,
    out_of_ptr,
    skip_ptr,
    position_ptr,
    state_ptr,
    y_ptr,
    num_rows,
    num_heads,
    heads,
    num_width,
    num_states,
    stride_x,
    stride_into,
    stride_out_of,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOW: tl.constexpr,
):
    """y_i = exp(log_i) state out_of_i + sum_j exp(log_i - log_j) (out_of_i . into_j) dt_j x_j
    + skip x_i for the rows i of a chunk and a head, with the state before the chunk."""
    pid_h, chunk = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    first, offs_q, live, position, _ = chunk_rows(position_ptr, chunk, num_rows, Q)
    kind = x_ptr.dtype.element_ty
    state_ptr += tl.program_id(0).to(tl.int64) * num_width * num_states
    into_ptr += first * stride_into + pid_h // heads * num_states
    out_of_ptr += first * stride_out_of + pid_h // heads * num_states
    y = tl.zeros((Q, BLOCK_P), tl.float32)
    score = tl.zeros((Q, Q), tl.float32)
    for start in tl.range(0, num_states, BLOCK_N, num_stages=1):
        offs_n = start + tl.arange(0, BLOCK_N)
        out_of = load_rows(out_of_ptr, offs_q, live, stride_out_of, offs_n, num_states)
        into = load_rows(into_ptr, offs_q, live, stride_into, offs_n, num_states)
        score = product(out_of, tl.trans(into), score, LOW, kind)
        state = load_state(state_ptr, offs_p, num_width, offs_n, num_states)
        y = product(out_of, tl.trans(state), y, LOW, kind)
    log = tl.load(log_ptr + pid_h.to(tl.int64) * num_rows + first + offs_q, mask=live, other=0.0)
    dt_ptr += first * num_heads + pid_h
    dt = tl.load(dt_ptr + offs_q * num_heads, mask=live, other=0.0)
    # Where a row does not see the state, that may be NaN.
    y = tl.where((position > offs_q)[:, None], y * tl.exp2(log)[:, None], 0.0)
    x_ptr += first * stride_x + pid_h * num_width
    x = load_rows(x_ptr, offs_q, live, stride_x, offs_p, num_width)
    seen = sees(offs_q, position)
    # Rows that are not finite act by their weights, which the mask holds, instead of their values.
    weight = score * kept(log, seen) * dt[None, :] + flaw(x)[None, :]
    y = product(tl.where(seen, weight, 0.0), finite(x), y, LOW, kind)
    y = tl.fma(x, tl.load(skip_ptr + pid_h).to(tl.float32) + tl.zeros_like(x), y)
    y_ptr += (first * num_heads + pid_h) * num_width
    at = offs_q[:, None] * (num_heads * num_width) + offs_p[None, :]
    mask = live[:, None] & (offs_p < num_width)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


def ssd_scan_fwd(
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    into: Tensor,
    out_of: Tensor,
    skip: Tensor,
    position: Tensor,
) -> Tensor:
    """Launches the scan; see `dragkit::ssd_scan_fwd`."""
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    num_rows, num_heads, num_width = x.shape
    groups, num_states = into.shape[1:]
    tile = scan_tile(x, into, out_of)
    x, into, out_of = rows_of(x), rows_of(into), rows_of(out_of)
    dt, rate, skip, position = (t.contiguous() for t in (dt, rate, skip, position))
    log, through = decay_logs(dt, rate, position, tile.chunk)
    state = chunk_states(x, dt, log, through, into, position, tile)
    grid = (through.shape[1] * num_heads, triton.cdiv(num_width, tile.width))
    _ssd_scan_fwd_output_kernel[grid](
        *(x, dt, log, into, out_of, skip, position, state, y),
        *(num_rows, num_heads, num_heads // groups, num_width, num_states),
        *(x.stride(0), into.stride(0), out_of.stride(0)),
        **tile.for_output.options,
    )
    return y


@triton.jit(do_not_specialize=["num_rows", "num_heads", "heads"])
def _ssd_state_fwd_kernel(
    x_ptr,
    dt_ptr,
    log_ptr,
    into_ptr,
    position_ptr,
    state_ptr,
    last_ptr,
    out_ptr,
    num_rows,
    num_heads,
    heads,
    num_width,
    num_states,
    stride_x,
    stride_into,
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
    length = tl.load(position_ptr + end)
    live = (offs_q <= place) & (place - offs_q <= length)
    log_ptr += pid_h.to(tl.int64) * num_rows
    log = tl.load(log_ptr + first + offs_q, mask=live, other=0.0)
    whole = tl.load(log_ptr + end)
    dt_ptr += first * num_heads + pid_h
    dt = tl.load(dt_ptr + offs_q * num_heads, mask=live, other=0.0)
    weight = tl.exp2(tl.where(live, whole - log, 0.0)) * dt
    x_ptr += first * stride_x + pid_h * num_width
    x = load_rows(x_ptr, offs_q, live, stride_x, offs_p, num_width)
    into_ptr += first * stride_into + pid_h // heads * num_states
    into = load_rows(into_ptr, offs_q, live, stride_into, offs_n, num_states)
    x = tl.where(live[:, None], x * weight[:, None], 0.0)
    state_ptr += (chunk * num_heads + pid_h) * num_width * num_states
    state = load_state(state_ptr, offs_p, num_width, offs_n, num_states)
    state = tl.where(length > place, state * tl.exp2(whole), 0.0)
    state = product(tl.trans(x), into, state, LOW, x_ptr.dtype.element_ty)
    out_ptr += tl.program_id(0).to(tl.int64) * num_width * num_states
    mask = (offs_p < num_width)[:, None] & (offs_n < num_states)[None, :]
    tl.store(out_ptr + offs_p[:, None] * num_states + offs_n[None, :], state, mask=mask)


def ssd_state_fwd(
    x: Tensor, dt: Tensor, rate: Tensor, into: Tensor, position: Tensor, last: Tensor
) -> Tensor:
    """Launches the states at the rows of `last`; see `dragkit::ssd_state_fwd`."""
    num_rows, num_heads, num_width = x.shape
    groups, num_states = into.shape[1:]
    out = x.new_empty(last.shape[0], num_heads, num_width, num_states, dtype=torch.float32)
    if out.numel() == 0:
        return out
    tile = scan_tile(x, into)
    x, into = rows_of(x), rows_of(into)
    dt, rate, position = (t.contiguous() for t in (dt, rate, position))
    log, through = decay_logs(dt, rate, position, tile.chunk)
    state = chunk_states(x, dt, log, through, into, position, tile)
    blocks = triton.cdiv(num_width, tile.width), triton.cdiv(num_states, tile.states)
    _ssd_state_fwd_kernel[(last.shape[0] * num_heads, *blocks)](
        *(x, dt, log, into, position, state, last.contiguous(), out),
        *(num_rows, num_heads, num_heads // groups, num_width, num_states),
        *(x.stride(0), into.stride(0)),
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
