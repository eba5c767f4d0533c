"""Triton kernel of all ordered sums of this folder: rows of a matrix added up by target row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import ROW_TILE, Budget, KernelSpec
from ..orders import RowOrder
from ..segments import segment_ptr


@triton.jit(do_not_specialize=["num_places"])
def _segment_sum_fwd_kernel(
    value_ptr,
    place_ptr,
    begin_ptr,
    out_ptr,
    num_places,
    stride,
    first,
    jump,
    num_columns,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out_v = sum over begin[v] <= i < begin[v+1] of the place p = place[i], or i without places.

    Place p is the piece of `num_columns` numbers from `first` on in row p of a matrix, and place
    p + num_places the one `jump` numbers after it.
    """
    pid_v = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_columns
    end = tl.load(begin_ptr + pid_v + 1)
    acc = tl.zeros((BLOCK_E, BLOCK_C), tl.float32)
    for start in range(tl.load(begin_ptr + pid_v), end, BLOCK_E):
        slot = start + tl.arange(0, BLOCK_E)
        place = slot
        if place_ptr is not None:
            place = tl.load(place_ptr + slot, mask=slot < end, other=0)
        row = (place % num_places).to(tl.int64)
        piece = (place // num_places).to(tl.int64)
        at = (row * stride + piece * jump)[:, None] + first + offs_c[None, :]
        mask = (slot < end)[:, None] & mask_c[None, :]
        acc += tl.load(value_ptr + at, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(acc, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + pid_v * num_columns + offs_c, total, mask=mask_c)


def sum_rows(
    value: Tensor,
    place: Tensor | None,
    ptr: Tensor,
    *,
    num_columns: int,
    first: int = 0,
    jump: int = 0,
) -> Tensor:
    """Launches the sum of pieces of the rows of a contiguous matrix: [V, num_columns]."""
    num_rows = ptr.shape[0] - 1
    out = value.new_empty(num_rows, num_columns)
    if out.numel() == 0:
        return out
    _segment_sum_fwd_kernel[ROW_TILE.grid(num_rows * ROW_TILE.rows, num_columns)](
        value,
        place,
        ptr,
        out,
        max(value.shape[0], 1),
        value.shape[1],
        first,
        jump,
        num_columns,
        BLOCK_E=ROW_TILE.rows,
        BLOCK_C=ROW_TILE.columns,
        **ROW_TILE.options,
    )
    return out


def sum_by(value: Tensor, order: RowOrder, **piece: int) -> Tensor:
    """Launches the sum of the places of every row of an order."""
    return sum_rows(value.contiguous(), order.place.contiguous(), order.ptr.contiguous(), **piece)


def segment_sum_fwd(value: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """Launches the sum of consecutive rows; see `dragkit::segment_sum_fwd`."""
    ptr = segment_ptr(segment.contiguous(), num_segments)
    return sum_rows(value.contiguous(), None, ptr, num_columns=value.shape[1])


KERNELS = tuple(
    KernelSpec(
        _segment_sum_fwd_kernel,
        types={
            "value_ptr": kind,
            "place_ptr": place,
            "begin_ptr": "*i32",
            "out_ptr": kind,
            **dict.fromkeys(("num_places", "stride", "first", "jump", "num_columns"), "i32"),
        },
        constants={"BLOCK_E": ROW_TILE.rows, "BLOCK_C": ROW_TILE.columns},
        num_warps=ROW_TILE.num_warps,
        budget=Budget(registers=64, shared=8192, wide_loads=2),
        divisible=("stride", "first", "jump", "num_columns"),
        max_registers=ROW_TILE.max_registers,
    )
    for kind in ("*bf16", "*fp32")
    for place in ("*i32", None)
)
