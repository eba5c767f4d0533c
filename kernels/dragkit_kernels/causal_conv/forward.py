"""Triton forward of causal_conv: a program walks down the rows of a stripe of columns."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import ResourceLimits, Tile, row_strided, spec

# 256 columns are eight per thread: one 128-bit load in float16 or bfloat16.
STRIPE = Tile(256, 1, max_registers=128)
# Rows per program. The W - 1 rows before them are loaded twice.
ROWS = 32
# Rows that are loaded before the first of them is used, which hides memory latency.
STEP = 4


@triton.jit
def load_taps(weight_ptr, offs_c, mask_c, W: tl.constexpr):
    """The W taps from lag 0 on, float32 [BLOCK_C] each."""
    taps = ()
    for lag in tl.static_range(W):
        tap = tl.load(weight_ptr + offs_c * W + (W - 1 - lag), mask=mask_c, other=0.0)
        taps = taps + (tap.to(tl.float32),)
    return taps


@triton.jit
def valid_columns(row, end, num_columns):
    """num_columns for 0 <= row < end, else 0: one comparison then masks rows and columns."""
    return tl.where((row >= 0) & (row < end), num_columns, 0)


@triton.jit
def load_rows(x_ptr, begin, end, num_columns, stride, offs_c, STEP: tl.constexpr):
    """STEP rows of the stripe from `begin` on, in their own dtype, 0 where masked."""
    rows = ()
    for step in tl.static_range(STEP):
        row = begin + step
        # int64: T C may exceed 2^31.
        offs = row.to(tl.int64) * stride + offs_c
        mask = offs_c < valid_columns(row, end, num_columns)
        rows = rows + (tl.load(x_ptr + offs, mask=mask, other=0.0),)
    return rows


@triton.jit
def load_history(x_ptr, begin, num_columns, stride, offs_c, W: tl.constexpr):
    """The W - 1 rows before `begin`, the nearest first, in their own dtype."""
    history = ()
    if W > 1:
        rows = load_rows(x_ptr, begin - (W - 1), begin, num_columns, stride, offs_c, W - 1)
        for lag in tl.static_range(1, W):
            history = history + (rows[W - 1 - lag],)
    return history


@triton.jit
def convolve(x, history, taps, bias, seq_pos, W: tl.constexpr):
    """bias + taps[0] x + taps[1] history[0] + ... over lags up to seq_pos."""
    y = tl.fma(taps[0], x.to(tl.float32), bias)
    for lag in tl.static_range(1, W):
        with_tap = tl.fma(taps[lag], history[lag - 1].to(tl.float32), y)
        # Select: 0 times a NaN of another sequence is NaN.
        y = tl.where(seq_pos >= lag, with_tap, y)
    return y


@triton.jit
def shift_history(x, history, W: tl.constexpr):
    """The W - 1 rows before the next row."""
    shifted = ()
    if W > 1:
        shifted = (x,)
        for lag in tl.static_range(1, W - 1):
            shifted = shifted + (history[lag - 1],)
    return shifted


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"])
def _causal_conv_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, seq_pos_ptr,
    out_ptr,
    num_rows, rows_per_program, num_columns,
    stride_x,
    W: tl.constexpr, STEP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out_t = silu(b + sum_j weight[:, W-1-j] x_{t-j}), j < W and j <= seq_pos_t.

    One program per rows_per_program rows and BLOCK_C columns.
    """
    begin = tl.program_id(0) * rows_per_program
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_columns
    taps = load_taps(weight_ptr, offs_c, mask_c, W)
    bias = tl.zeros((BLOCK_C,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    history = load_history(x_ptr, begin, num_columns, stride_x, offs_c, W)
    end = tl.minimum(begin + rows_per_program, num_rows)
    for start in range(begin, end, STEP):
        x_rows = load_rows(x_ptr, start, end, num_columns, stride_x, offs_c, STEP)
        for step in tl.static_range(STEP):
            row = start + step
            x = x_rows[step]
            seq_pos = tl.load(seq_pos_ptr + row, mask=row < end, other=0)
            y = convolve(x, history, taps, bias, seq_pos, W)
            y = y / (1.0 + tl.exp(-y))
            out = out_ptr + row.to(tl.int64) * num_columns + offs_c
            mask = offs_c < valid_columns(row, end, num_columns)
            tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask)
            history = shift_history(x, history, W)


def causal_conv_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, seq_pos: Tensor) -> Tensor:
    """Launches the kernel with the arguments of `dragkit::causal_conv_fwd`."""
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    x = row_strided(x)
    grid = triton.cdiv(x.shape[0], ROWS), triton.cdiv(x.shape[1], STRIPE.block)
    _causal_conv_fwd_kernel[grid](
        *(x, weight.contiguous(), None if bias is None else bias.contiguous()),
        *(seq_pos.contiguous(), out, x.shape[0], ROWS, x.shape[1], x.stride(0)),
        W=weight.shape[1],
        STEP=STEP,
        BLOCK_C=STRIPE.block,
        **STRIPE.options,
    )
    return out


KERNELS = tuple(
    spec(
        _causal_conv_fwd_kernel,
        ResourceLimits(registers=128, shared_bytes=0, vector_loads=7),
        tile=STRIPE,
        dtype=dtype,
        constants={"W": 4, "STEP": STEP},
        bias_ptr=bias,
    )
    for dtype in ("*bf16", "*fp32")
    for bias in (dtype, None)
)
