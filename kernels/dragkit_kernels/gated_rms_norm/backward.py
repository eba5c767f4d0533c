"""Triton backward of gated_rms_norm, which recomputes the forward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import ResourceLimits, row_strided, spec
from ..library import empty_gradients
from .forward import TILES, TILES_PER_PROGRAM, group_tile, inverse_rms, load_tile

# Maximum number of programs per group when each writes a partial sum for d_weight.
MAX_SUM_PROGRAMS = 256


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"])
def _gated_rms_norm_bwd_kernel(
    grad_ptr, y_ptr, gate_ptr, weight_ptr,
    d_y_ptr, d_gate_ptr, sums_ptr,
    num_rows, rows_per_program, num_columns, group_size,
    stride_grad, stride_y, stride_gate,
    eps,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dz = (g - n mean(g n)) / rms(z) with n = z / rms(z) and g = grad weight.

    dy = dz silu(gate), dgate = dz y silu'(gate), and sums[program] = sum_t grad n over the
    program's rows. Outputs without a pointer are not computed. One program per rows_per_program
    rows and group.
    """
    begin = tl.program_id(0) * rows_per_program
    end = tl.minimum(begin + rows_per_program, num_rows)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < group_size
    offs_d = tl.program_id(1) * group_size + offs_k
    weight = tl.load(weight_ptr + offs_d, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    # Rows stay separate until the end: one reduction per program instead of one per tile.
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in range(begin, end, BLOCK_R):
        offs_t = start + tl.arange(0, BLOCK_R)
        mask = (offs_t < end)[:, None] & mask_k[None, :]
        grad = load_tile(grad_ptr, offs_t, stride_grad, offs_d, mask)
        y = load_tile(y_ptr, offs_t, stride_y, offs_d, mask)
        z = y
        if gate_ptr is not None:
            gate = load_tile(gate_ptr, offs_t, stride_gate, offs_d, mask)
            sig = 1.0 / (1.0 + tl.exp(-gate))
            z = y * (gate * sig)
        scale = inverse_rms(z, group_size, eps)
        normed = z * scale
        if sums_ptr is not None:
            # Masked rows have scale = rsqrt(eps), which is infinite for eps = 0.
            acc = tl.where(mask, tl.fma(grad, normed, acc), acc)
        g = grad * weight
        mean_gn = (tl.sum(g * normed, 1) / group_size)[:, None]
        d_z = tl.fma(normed, -mean_gn, g) * scale
        offs = offs_t.to(tl.int64)[:, None] * num_columns + offs_d[None, :]
        if d_gate_ptr is not None:
            d_gate = d_z * y * sig * tl.fma(gate, 1.0 - sig, 1.0)
            tl.store(d_gate_ptr + offs, d_gate.to(d_gate_ptr.dtype.element_ty), mask=mask)
        if d_y_ptr is not None:
            if gate_ptr is not None:
                d_z = d_z * (gate * sig)
            tl.store(d_y_ptr + offs, d_z.to(d_y_ptr.dtype.element_ty), mask=mask)
    if sums_ptr is not None:
        offs = tl.program_id(0).to(tl.int64) * num_columns + offs_d
        tl.store(sums_ptr + offs, tl.sum(acc, 0), mask=mask_k)


def gated_rms_norm_bwd(
    grad: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    groups: int,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the gradients that output_mask asks for, see `dragkit::gated_rms_norm_bwd`."""
    num_rows, num_columns = y.shape
    needs_gate = gate is not None and output_mask[1]
    d_y, d_gate, d_weight = out = empty_gradients((y, gate, weight), output_mask)
    if y.numel() == 0:
        d_weight.zero_()
        return out
    group_size = num_columns // groups
    tile = group_tile(group_size)
    rows_per_program = TILES_PER_PROGRAM * tile.rows
    if output_mask[2]:
        rows_per_program = max(rows_per_program, triton.cdiv(num_rows, MAX_SUM_PROGRAMS))
    programs = triton.cdiv(num_rows, rows_per_program)
    sums = y.new_empty((programs, num_columns) if output_mask[2] else 0, dtype=torch.float32)
    grad, y = row_strided(grad), row_strided(y)
    gate = None if gate is None else row_strided(gate)
    if any(output_mask):
        _gated_rms_norm_bwd_kernel[programs, groups](
            *(grad, y, gate, weight.contiguous(), d_y if output_mask[0] else None),
            *(d_gate if needs_gate else None, sums if output_mask[2] else None),
            *(num_rows, rows_per_program, num_columns, group_size),
            *(grad.stride(0), y.stride(0), 0 if gate is None else gate.stride(0), eps),
            BLOCK_R=tile.rows,
            BLOCK_K=tile.columns,
            **tile.options,
        )
    if output_mask[2]:
        d_weight.copy_(sums.sum(0))  # in the order of programs
    return out


_LIMITS = ResourceLimits(registers=128, shared_bytes=2048, vector_loads=2)
KERNELS = tuple(
    spec(_gated_rms_norm_bwd_kernel, _LIMITS, tile=tile, dtype=dtype, sums_ptr=sums)
    for tile in TILES
    for dtype, sums in (("*bf16", None), ("*fp32", "*fp32"))
)
