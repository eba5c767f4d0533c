"""Triton forward of gated_rms_norm: a program walks down the rows of one group of columns."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import ResourceLimits, Tile2D, row_strided, spec

# A tile holds whole groups: eight values of each tensor per thread.
TILES = (
    Tile2D(rows=8, columns=128, num_warps=4, max_registers=128),
    Tile2D(rows=2, columns=512, num_warps=4, max_registers=128),
    Tile2D(rows=1, columns=4096, num_warps=16, max_registers=128),
)
# Tiles per program, which keeps the weights in registers.
TILES_PER_PROGRAM = 4


def group_tile(group_size: int) -> Tile2D:
    """The tile for groups of `group_size` columns.

    Raises:
        ValueError: the group exceeds the largest tile.
    """
    for tile in TILES:
        if group_size <= tile.columns:
            return tile
    raise ValueError(
        f"gated_rms_norm: the Triton kernels take groups of up to {TILES[-1].columns} columns, "
        f"got {group_size}. Use backend 'torch'."
    )


@triton.jit
def load_tile(ptr, offs_t, stride, offs_d, mask):
    """[R, K] in float32, 0 where masked."""
    offs = offs_t.to(tl.int64)[:, None] * stride + offs_d[None, :]
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def inverse_rms(z, group_size, eps):
    """[R, 1] 1 / rms of the rows of z, whose masked columns are 0."""
    return (1.0 / tl.sqrt(tl.sum(z * z, 1) / group_size + eps))[:, None]


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"])
def _gated_rms_norm_fwd_kernel(
    y_ptr, gate_ptr, weight_ptr,
    out_ptr,
    num_rows, rows_per_program, num_columns, group_size,
    stride_y, stride_gate,
    eps,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = z rsqrt(mean(z^2) + eps) weight with z = y silu(gate).

    One program per rows_per_program rows and group.
    """
    begin = tl.program_id(0) * rows_per_program
    end = tl.minimum(begin + rows_per_program, num_rows)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < group_size
    offs_d = tl.program_id(1) * group_size + offs_k
    # All tiles of the program share the weights of the group.
    weight = tl.load(weight_ptr + offs_d, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    for start in range(begin, end, BLOCK_R):
        offs_t = start + tl.arange(0, BLOCK_R)
        mask = (offs_t < end)[:, None] & mask_k[None, :]
        z = load_tile(y_ptr, offs_t, stride_y, offs_d, mask)
        if gate_ptr is not None:
            gate = load_tile(gate_ptr, offs_t, stride_gate, offs_d, mask)
            z = z * gate / (1.0 + tl.exp(-gate))
        out = z * inverse_rms(z, group_size, eps) * weight
        offs = offs_t.to(tl.int64)[:, None] * num_columns + offs_d[None, :]
        tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


def gated_rms_norm_fwd(
    y: Tensor, gate: Tensor | None, weight: Tensor, groups: int, eps: float
) -> Tensor:
    """Launches the kernel with the arguments of `dragkit::gated_rms_norm_fwd`."""
    out = y.new_empty(y.shape)
    if out.numel() == 0:
        return out
    y = row_strided(y)
    gate = None if gate is None else row_strided(gate)
    group_size = y.shape[1] // groups
    tile = group_tile(group_size)
    rows_per_program = TILES_PER_PROGRAM * tile.rows
    _gated_rms_norm_fwd_kernel[triton.cdiv(y.shape[0], rows_per_program), groups](
        *(y, gate, weight.contiguous(), out, y.shape[0], rows_per_program, y.shape[1], group_size),
        *(y.stride(0), 0 if gate is None else gate.stride(0), eps),
        BLOCK_R=tile.rows,
        BLOCK_K=tile.columns,
        **tile.options,
    )
    return out


_LIMITS = ResourceLimits(registers=128, shared_bytes=2048, vector_loads=2)
KERNELS = tuple(
    spec(_gated_rms_norm_fwd_kernel, _LIMITS, tile=tile, dtype=dtype, gate_ptr=gate)
    for tile in TILES
    for dtype, gate in (("*bf16", "*bf16"), ("*fp32", None))
)
