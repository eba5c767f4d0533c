"""Triton forward of gated_rms_norm: a program walks down some rows of one group of columns."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import Budget, WideTile, row_strided, spec

# A whole group at a time, eight numbers of each tensor for each thread.
TILES = (
    WideTile(rows=8, columns=128, num_warps=4, max_registers=128),
    WideTile(rows=2, columns=512, num_warps=4, max_registers=128),
    WideTile(rows=1, columns=4096, num_warps=16, max_registers=128),
)
# Tiles that a program walks down with the weights in its registers.
STEPS = 4


def group_tile(size: int) -> WideTile:
    """The tile for groups of `size` columns.

    Raises:
        ValueError: a group that no tile holds.
    """
    for tile in TILES:
        if size <= tile.columns:
            return tile
    raise ValueError(
        f"gated_rms_norm: the Triton kernels take groups of up to {TILES[-1].columns} columns, "
        f"got {size}; use backend 'torch'"
    )


@triton.jit
def load_tile(ptr, offs_t, stride, offs_d, mask):
    """[R, K] in float32, zeros where it is masked."""
    at = offs_t.to(tl.int64)[:, None] * stride + offs_d[None, :]
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def inverse_rms(z, size, eps):
    """[R, 1] of the rows of z, whose masked columns are zero."""
    return (1.0 / tl.sqrt(tl.sum(z * z, 1) / size + eps))[:, None]


@triton.jit(do_not_specialize=["num_rows", "rows"])
def _gated_rms_norm_fwd_kernel(
    y_ptr,
    gate_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    rows,
    num_columns,
    size,
    stride_y,
    stride_gate,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = z rsqrt(mean(z^2) + eps) weight, z = y silu(gate), of one group of columns."""
    begin = tl.program_id(0) * rows
    end = tl.minimum(begin + rows, num_rows)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < size
    offs_d = tl.program_id(1) * size + offs_k
    weight = tl.load(weight_ptr + offs_d, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    for start in range(begin, end, BLOCK_R):
        offs_t = start + tl.arange(0, BLOCK_R)
        mask = (offs_t < end)[:, None] & mask_k[None, :]
        z = load_tile(y_ptr, offs_t, stride_y, offs_d, mask)
        if gate_ptr is not None:
            gate = load_tile(gate_ptr, offs_t, stride_gate, offs_d, mask)
            z = z * gate / (1.0 + tl.exp(-gate))
        out = z * inverse_rms(z, size, eps) * weight
        at = offs_t.to(tl.int64)[:, None] * num_columns + offs_d[None, :]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def gated_rms_norm_fwd(
    y: Tensor, gate: Tensor | None, weight: Tensor, groups: int, eps: float
) -> Tensor:
    """Launches the walk; see `dragkit::gated_rms_norm_fwd`."""
    out = y.new_empty(y.shape)
    if out.numel() == 0:
        return out
    y = row_strided(y)
    gate = None if gate is None else row_strided(gate)
    size = y.shape[1] // groups
    tile = group_tile(size)
    rows = STEPS * tile.rows
    _gated_rms_norm_fwd_kernel[triton.cdiv(y.shape[0], rows), groups](
        y,
        gate,
        weight.contiguous(),
        out,
        y.shape[0],
        rows,
        y.shape[1],
        size,
        y.stride(0),
        0 if gate is None else gate.stride(0),
        eps,
        BLOCK_R=tile.rows,
        BLOCK_K=tile.columns,
        **tile.options,
    )
    return out


_BUDGET = Budget(registers=128, shared=2048, wide_loads=2)
KERNELS = tuple(
    spec(_gated_rms_norm_fwd_kernel, _BUDGET, tile=tile, dtype=dtype, gate_ptr=gate)
    for tile in TILES
    for dtype, gate in (("*bf16", "*bf16"), ("*fp32", None))
)
