"""Triton backward of causal_conv: the same walk, which recomputes the sums of the forward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import ResourceLimits, Tile, row_strided, spec
from ..library import empty_gradients
from .forward import (
    ROWS,
    convolve,
    load_history,
    load_rows,
    load_taps,
    shift_history,
    valid_columns,
)

# Four columns per thread. Eight would leave no registers to load several rows ahead, and bytes in
# flight matter more than wider loads.
STRIPE = Tile(128, 1, max_registers=128)
# Rows that are loaded ahead, without and with sums in registers.
STEP, SUM_STEP = 4, 2
# Maximum number of programs per stripe when each writes partial sums for d_weight and d_bias.
MAX_SUM_PROGRAMS = 256


@triton.jit
def _finish_row(d, pending, taps, seq_pos, W: tl.constexpr):
    """dx of row t - (W - 1). Row t contributes its last term."""
    d_row = taps[0] * d
    if W > 1:
        d_row = tl.where(seq_pos >= W - 1, tl.fma(taps[W - 1], d, pending[W - 2]), pending[W - 2])
    return d_row


@triton.jit
def _shift_pending(d, pending, taps, seq_pos, W: tl.constexpr):
    """Partial dx of the rows t, t - 1, ..., t - (W - 2)."""
    shifted = ()
    if W > 1:
        shifted = (taps[0] * d,)
        for lag in tl.static_range(1, W - 1):
            with_tap = tl.fma(taps[lag], d, pending[lag - 1])
            shifted = shifted + (tl.where(seq_pos >= lag, with_tap, pending[lag - 1]),)
    return shifted


@triton.jit
def _add_sums(d, x, history, sums, max_lag, W: tl.constexpr):
    """Adds d_t x_{t-j} to sum j for every j <= max_lag, and d_t to the last sum if max_lag >= 0."""
    shifted = (tl.where(max_lag >= 0, tl.fma(d, x.to(tl.float32), sums[0]), sums[0]),)
    for lag in tl.static_range(1, W):
        with_tap = tl.fma(d, history[lag - 1].to(tl.float32), sums[lag])
        shifted = shifted + (tl.where(max_lag >= lag, with_tap, sums[lag]),)
    return shifted + (tl.where(max_lag >= 0, sums[W] + d, sums[W]),)


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"])
def _causal_conv_bwd_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, seq_pos_ptr,
    d_x_ptr, sums_ptr,
    num_rows, rows_per_program, num_columns,
    stride_grad, stride_x,
    W: tl.constexpr, STEP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx_t = sum_j weight[:, W-1-j] d_{t+j}, j < W and j <= seq_pos_{t+j}, d = grad silu'(y).

    sums[program] = sum_t d_t x_{t-j} for every j, then sum_t d_t, over the program's rows. Outputs
    without a pointer are not computed. One program per rows_per_program rows and BLOCK_C columns.
    """
    begin = tl.program_id(0) * rows_per_program
    end = tl.minimum(begin + rows_per_program, num_rows)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_columns
    zero = tl.zeros((BLOCK_C,), tl.float32)
    taps = load_taps(weight_ptr, offs_c, mask_c, W)
    bias = zero
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    history = load_history(x_ptr, begin, num_columns, stride_x, offs_c, W)
    pending = ()
    sums = (zero,)
    for _ in tl.static_range(W):
        sums = sums + (zero,)
    for _ in tl.static_range(1, W):
        pending = pending + (zero,)
    # dx of a row is complete W - 1 rows later.
    last = end
    if d_x_ptr is not None:
        last = end + W - 1
    for start in range(begin, last, STEP):
        x_rows = load_rows(x_ptr, start, num_rows, num_columns, stride_x, offs_c, STEP)
        grads = load_rows(grad_ptr, start, num_rows, num_columns, stride_grad, offs_c, STEP)
        for step in tl.static_range(STEP):
            row = start + step
            x = x_rows[step]
            d = grads[step].to(tl.float32)
            seq_pos = tl.load(seq_pos_ptr + row, mask=row < num_rows, other=0)
            y = convolve(x, history, taps, bias, seq_pos, W)
            sig = 1.0 / (1.0 + tl.exp(-y))
            d = d * sig * tl.fma(y, 1.0 - sig, 1.0)
            if d_x_ptr is not None:
                d_row = _finish_row(d, pending, taps, seq_pos, W)
                pending = _shift_pending(d, pending, taps, seq_pos, W)
                offs = (row - (W - 1)).to(tl.int64) * num_columns + offs_c
                # The previous program walks on to complete the rows before `begin`.
                stored_row = tl.where(row - (W - 1) >= begin, row - (W - 1), end)
                mask = offs_c < valid_columns(stored_row, end, num_columns)
                tl.store(d_x_ptr + offs, d_row.to(d_x_ptr.dtype.element_ty), mask=mask)
            if sums_ptr is not None:
                # The next program sums the rows from `end` on: a lag of -1 adds nothing.
                sums = _add_sums(d, x, history, sums, tl.where(row < end, seq_pos, -1), W)
            history = shift_history(x, history, W)
    if sums_ptr is not None:
        for lag in tl.static_range(W + 1):
            offs = (tl.program_id(0) * (W + 1) + lag).to(tl.int64) * num_columns + offs_c
            tl.store(sums_ptr + offs, sums[lag], mask=mask_c)


def causal_conv_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_pos: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the gradients that output_mask asks for, see `dragkit::causal_conv_bwd`."""
    (num_rows, num_columns), width = x.shape, weight.shape[1]
    d_x, d_weight, d_bias = out = empty_gradients((x, weight, bias), output_mask)
    with_sums = output_mask[1] or output_mask[2]
    # Longer programs bound the number of partial sums.
    rows_per_program = max(ROWS, triton.cdiv(num_rows, MAX_SUM_PROGRAMS)) if with_sums else ROWS
    programs = triton.cdiv(num_rows, rows_per_program)
    sums = x.new_empty((programs, width + 1, num_columns) if with_sums else 0, dtype=torch.float32)
    if x.numel() > 0 and any(output_mask):
        grad, x = row_strided(grad), row_strided(x)
        _causal_conv_bwd_kernel[programs, triton.cdiv(num_columns, STRIPE.block)](
            *(grad, x, weight.contiguous(), None if bias is None else bias.contiguous()),
            *(seq_pos.contiguous(), d_x if output_mask[0] else None, sums if with_sums else None),
            *(num_rows, rows_per_program, num_columns, grad.stride(0), x.stride(0)),
            W=width,
            STEP=SUM_STEP if with_sums else STEP,
            BLOCK_C=STRIPE.block,
            **STRIPE.options,
        )
    total = sums.sum(0) if with_sums else sums  # in the order of programs
    if output_mask[1]:
        d_weight.copy_(total[:width].flip(0).mT)
    if output_mask[2]:
        d_bias.copy_(total[width])
    return out


KERNELS = tuple(
    spec(
        _causal_conv_bwd_kernel,
        ResourceLimits(
            registers=128, shared_bytes=0, vector_loads=8 if (dtype, step) == ("*fp32", STEP) else 0
        ),
        tile=STRIPE,
        dtype=dtype,
        constants={"W": 4, "STEP": step},
        bias_ptr=bias,
        sums_ptr=None if step == STEP else "*fp32",
    )
    for dtype in ("*bf16", "*fp32")
    for step, bias in ((STEP, dtype), (SUM_STEP, dtype), (SUM_STEP, None))
)
