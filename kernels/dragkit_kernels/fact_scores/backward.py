"""Triton backward of fact_scores: sums of one number per fact, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import ResourceLimits, Tile, spec

TILE = Tile(16, 4)
# Facts in one step of a tile of rows.
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
    """out_v = sum of grad[perm_i] over rowptr[v] <= i < rowptr[v+1], for a tile of rows v.

    The facts of a tile's rows are adjacent in `perm`. The program reads each of them once, in
    blocks, and every row selects its facts. Its cost is the number of facts, however the rows
    divide them.
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
        # `where` and not a product: a NaN must not reach other rows.
        is_in_row = (offs_e[None, :] >= begin) & (offs_e[None, :] < end)
        acc += tl.where(is_in_row, grad, 0.0)
    tl.store(out_ptr + offs_v, tl.sum(acc, 1), mask=mask_v)


def fact_scores_bwd(grad: Tensor, sums: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches one sum for each score table (see `dragkit::fact_scores_bwd`)."""
    grad = grad.contiguous()
    groupings = list(zip(sums[::2], sums[1::2], strict=True))
    for ptr, perm in groupings[3:]:
        grad = _sum_by_row(grad, ptr, perm)
    return (*(_sum_by_row(grad, ptr, perm) for ptr, perm in groupings[:3]), grad.sum())


def _sum_by_row(grad: Tensor, ptr: Tensor, perm: Tensor) -> Tensor:
    num_rows = ptr.shape[0] - 1
    out = grad.new_empty(num_rows)
    if num_rows > 0:
        _fact_scores_bwd_sum_kernel[(triton.cdiv(num_rows, TILE.block),)](
            grad,
            ptr.contiguous(),
            perm.contiguous(),
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
