"""Triton backward of causal_conv: the same walk, with the sums made again on the way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Budget, Tile, row_strided, spec
from ..library import empty_gradients
from .forward import (
    ROWS,
    columns_of,
    convolve,
    load_past,
    load_rows,
    load_taps,
    pushed,
)

# Four columns for each thread: with eight, what a thread carries leaves no registers to ask for
# several rows at a time, and that many bytes on their way count for more than wider loads.
STRIPE = Tile(128, 1, max_registers=128)
# Rows asked for at a time, and where a thread has sums to carry as well.
STEP, SUM_STEP = 4, 2
# Programs that share the rows at most, where each writes sums of its own.
SUM_PROGRAMS = 256


@triton.jit
def _finished(d, pending, taps, position, W: tl.constexpr):
    """The gradient of row t - (W - 1), whose last share is that of row t."""
    done = taps[0] * d
    if W > 1:
        done = tl.where(position >= W - 1, tl.fma(taps[W - 1], d, pending[W - 2]), pending[W - 2])
    return done


@triton.jit
def _pending(d, pending, taps, position, W: tl.constexpr):
    """Gradients so far of the rows t, t - 1, ..., t - (W - 2)."""
    moved = ()
    if W > 1:
        moved = (taps[0] * d,)
        for back in tl.static_range(1, W - 1):
            more = tl.fma(taps[back], d, pending[back - 1])
            moved = moved + (tl.where(position >= back, more, pending[back - 1]),)
    return moved


@triton.jit
def _added(d, x, past, sums, reach, W: tl.constexpr):
    """Sums of d_t x_{t-j} for every j <= reach, then of d_t; nothing where reach is negative."""
    moved = (tl.where(reach >= 0, tl.fma(d, x.to(tl.float32), sums[0]), sums[0]),)
    for back in tl.static_range(1, W):
        more = tl.fma(d, past[back - 1].to(tl.float32), sums[back])
        moved = moved + (tl.where(reach >= back, more, sums[back]),)
    return moved + (tl.where(reach >= 0, sums[W] + d, sums[W]),)


@triton.jit(do_not_specialize=["num_rows", "rows"])
def _causal_conv_bwd_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    d_x_ptr,
    sums_ptr,
    num_rows,
    rows,
    num_columns,
    stride_grad,
    stride_x,
    W: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx_t = sum_j weight[:, W-1-j] d_{t+j}, j < W and j <= position_{t+j}; d = grad silu'(y).

    sums[program] = sum_t d_t x_{t-j} for every j, then sum_t d_t, over the program's rows. What has
    no place to go is not computed.
    """
    begin = tl.program_id(0) * rows
    end = tl.minimum(begin + rows, num_rows)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_columns
    zero = tl.zeros((BLOCK_C,), tl.float32)
    taps = load_taps(weight_ptr, offs_c, mask_c, W)
    bias = zero
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    past = load_past(x_ptr, begin, num_columns, stride_x, offs_c, W)
    pending = ()
    sums = (zero,)
    for _ in tl.static_range(W):
        sums = sums + (zero,)
    for _ in tl.static_range(1, W):
        pending = pending + (zero,)
    # A row's gradient is finished W - 1 rows further down.
    last = end
    if d_x_ptr is not None:
        last = end + W - 1
    for start in range(begin, last, STEP):
        ahead = load_rows(x_ptr, start, num_rows, num_columns, stride_x, offs_c, STEP)
        grads = load_rows(grad_ptr, start, num_rows, num_columns, stride_grad, offs_c, STEP)
        for step in tl.static_range(STEP):
            row = start + step
            x = ahead[step]
            d = grads[step].to(tl.float32)
            position = tl.load(position_ptr + row, mask=row < num_rows, other=0)
            y = convolve(x, past, taps, bias, position, W)
            share = 1.0 / (1.0 + tl.exp(-y))
            d = d * share * tl.fma(y, 1.0 - share, 1.0)
            if d_x_ptr is not None:
                done = _finished(d, pending, taps, position, W)
                pending = _pending(d, pending, taps, position, W)
                at = (row - (W - 1)).to(tl.int64) * num_columns + offs_c
                shown = tl.where(row - (W - 1) >= begin, row - (W - 1), end)
                mask = offs_c < columns_of(shown, end, num_columns)
                tl.store(d_x_ptr + at, done.to(d_x_ptr.dtype.element_ty), mask=mask)
            if sums_ptr is not None:
                sums = _added(d, x, past, sums, tl.where(row < end, position, -1), W)
            past = pushed(x, past, W)
    if sums_ptr is not None:
        for place in tl.static_range(W + 1):
            at = (tl.program_id(0) * (W + 1) + place).to(tl.int64) * num_columns + offs_c
            tl.store(sums_ptr + at, sums[place], mask=mask_c)


def causal_conv_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches what output_mask asks for in one walk; see `dragkit::causal_conv_bwd`."""
    (num_rows, num_columns), width = x.shape, weight.shape[1]
    d_x, d_weight, d_bias = out = empty_gradients((x, weight, bias), output_mask)
    with_sums = output_mask[1] or output_mask[2]
    rows = max(ROWS, triton.cdiv(num_rows, SUM_PROGRAMS)) if with_sums else ROWS
    programs = triton.cdiv(num_rows, rows)
    sums = x.new_empty((programs, width + 1, num_columns) if with_sums else 0, dtype=torch.float32)
    if x.numel() > 0 and any(output_mask):
        grad, x = row_strided(grad), row_strided(x)
        _causal_conv_bwd_kernel[programs, triton.cdiv(num_columns, STRIPE.block)](
            grad,
            x,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            position.contiguous(),
            d_x if output_mask[0] else None,
            sums if with_sums else None,
            num_rows,
            rows,
            num_columns,
            grad.stride(0),
            x.stride(0),
            W=width,
            STEP=SUM_STEP if with_sums else STEP,
            BLOCK_C=STRIPE.block,
            **STRIPE.options,
        )
    total = sums.sum(0) if with_sums else sums  # in order
    if output_mask[1]:
        d_weight.copy_(total[:width].flip(0).mT)
    if output_mask[2]:
        d_bias.copy_(total[width])
    return out


KERNELS = tuple(
    spec(
        _causal_conv_bwd_kernel,
        Budget(registers=128, shared=0, wide_loads=8 if (dtype, step) == ("*fp32", STEP) else 0),
        tile=STRIPE,
        dtype=dtype,
        constants={"W": 4, "STEP": step},
        bias_ptr=bias,
        sums_ptr=None if step == STEP else "*fp32",
    )
    for dtype in ("*bf16", "*fp32")
    for step, bias in ((STEP, dtype), (SUM_STEP, dtype), (SUM_STEP, None))
)
