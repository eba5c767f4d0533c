"""Triton forward of segment_sum: matrix rows summed by segment, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import ROW_TILE, ResourceLimits, spec
from ..segments import segment_ptr


@triton.jit
def _segment_sum_fwd_kernel(
    value_ptr,
    perm_ptr,
    rowptr_ptr,
    out_ptr,
    num_columns,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out_v = sum of value[perm_i] over rowptr[v] <= i < rowptr[v+1]. Without perm, perm_i = i."""
    pid_v = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_columns
    end = tl.load(rowptr_ptr + pid_v + 1)
    # Lane i adds every BLOCK_E-th row. One reduction at the end keeps the order fixed.
    acc = tl.zeros((BLOCK_E, BLOCK_C), tl.float32)
    for start in range(tl.load(rowptr_ptr + pid_v), end, BLOCK_E):
        offs_e = start + tl.arange(0, BLOCK_E)
        mask_e = offs_e < end
        row = offs_e
        if perm_ptr is not None:
            row = tl.load(perm_ptr + offs_e, mask=mask_e, other=0)
        offs = row.to(tl.int64)[:, None] * num_columns + offs_c[None, :]
        mask = mask_e[:, None] & mask_c[None, :]
        acc += tl.load(value_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(acc, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + pid_v * num_columns + offs_c, total, mask=mask_c)


def sum_rows(value: Tensor, perm: Tensor | None, ptr: Tensor) -> Tensor:
    """Launches the sums: [V, C], from value [T, C], perm int32 [P] or None, and ptr int32 [V+1]."""
    num_rows, num_columns = ptr.shape[0] - 1, value.shape[1]
    out = value.new_empty(num_rows, num_columns)
    if out.numel() == 0:
        return out
    _segment_sum_fwd_kernel[ROW_TILE.grid(num_rows * ROW_TILE.rows, num_columns)](
        value.contiguous(),
        None if perm is None else perm.contiguous(),
        ptr.contiguous(),
        out,
        num_columns,
        BLOCK_E=ROW_TILE.rows,
        BLOCK_C=ROW_TILE.columns,
        **ROW_TILE.options,
    )
    return out


def segment_sum_fwd(value: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """Launches the sum of adjacent rows (see `dragkit::segment_sum_fwd`)."""
    return sum_rows(value, None, segment_ptr(segment.contiguous(), num_segments))


KERNELS = tuple(
    spec(
        _segment_sum_fwd_kernel,
        ResourceLimits(registers=64, shared_bytes=8192, vector_loads=2),
        tile=ROW_TILE,
        dtype=dtype,
        perm_ptr=perm,
    )
    for dtype in ("*bf16", "*fp32")
    for perm in ("*i32", None)
)
