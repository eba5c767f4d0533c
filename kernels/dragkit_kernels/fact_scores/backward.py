"""Triton backward of fact_scores: ordered sums of a scalar per fact."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import ResourceLimits, Tile, spec

TILE = Tile(16, 4)
# Facts that the rows of a tile pick from at a time.
FACTS = 128


@triton.jit(do_not_specialize=["num_rows"])
def _fact_scores_bwd_sum_kernel(
    grad_ptr,
    rowptr_ptr,
    perm_ptr,
    out_ptr,
    num_rows,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out_v = sum of grad[order_i] over ptr[v] <= i < ptr[v+1], for a tile of rows v.

    The facts of consecutive rows lie side by side in the order, so a tile walks them all in blocks
    and every row picks its own: a long row costs its facts, not those of its neighbours.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_V
    offs_v = first + tl.arange(0, BLOCK_V)
    mask_v = offs_v < num_rows
    begin = tl.load(rowptr_ptr + offs_v, mask=mask_v, other=0)[:, None]
    end = tl.load(rowptr_ptr + offs_v + 1, mask=mask_v, other=0)[:, None]
    tile_begin = tl.load(rowptr_ptr + first)
    tile_end = tl.load(rowptr_ptr + tl.minimum(first + BLOCK_V, num_rows))
    acc = tl.zeros((BLOCK_V, BLOCK_E), tl.float32)
    for start in range(tile_begin, tile_end, BLOCK_E):
        offs_e = start + tl.arange(0, BLOCK_E)
        mask_e = offs_e < tile_end
        fact = tl.load(perm_ptr + offs_e, mask=mask_e, other=0)
        grad = tl.load(grad_ptr + fact, mask=mask_e, other=0.0)[None, :]
        is_in_row = (offs_e[None, :] >= begin) & (offs_e[None, :] < end)
        acc += tl.where(is_in_row, grad, 0.0)
    tl.store(out_ptr + offs_v, tl.sum(acc, 1), mask=mask_v)


def fact_scores_bwd(grad: Tensor, sums: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches one sum per table; see `dragkit::fact_scores_bwd`."""
    grad = grad.contiguous()
    tables = list(zip(sums[::2], sums[1::2], strict=True))
    for ptr, order in tables[3:]:
        grad = _ordered_sum(grad, ptr, order)
    return (*(_ordered_sum(grad, ptr, order) for ptr, order in tables[:3]), grad.sum())


def _ordered_sum(grad: Tensor, ptr: Tensor, order: Tensor) -> Tensor:
    num_rows = ptr.shape[0] - 1
    out = grad.new_empty(num_rows)
    if num_rows > 0:
        _fact_scores_bwd_sum_kernel[(triton.cdiv(num_rows, TILE.block),)](
            grad,
            ptr.contiguous(),
            order.contiguous(),
            out,
            num_rows,
            BLOCK_V=TILE.block,
            BLOCK_E=FACTS,
            **TILE.options,
        )
    return out


KERNELS = (
    spec(
        _fact_scores_bwd_sum_kernel,
        ResourceLimits(registers=80, shared_bytes=512),
        tile=TILE,
        constants={"BLOCK_E": FACTS},
    ),
)
