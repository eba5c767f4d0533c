"""Triton backward of relation_sum: each pair sums the gradients at both ends of its facts."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..chunk_sums import chunk_sums
from ..launch import ResourceLimits, spec
from ..orders import contiguous_index
from ..row_sums import COLUMNS, DTYPES, Summand, block_columns, dot_tile, sum_row


@triton.jit
def _relation_sum_bwd_kernel(
    grad_ptr,
    head_ptr,
    tail_ptr,
    pair_rowptr_ptr,
    pair_perm_ptr,
    head_count_ptr,
    tail_count_ptr,
    chunk_fwd_ptr,
    chunk_inv_ptr,
    d_table_ptr,
    num_columns,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dtable_r = sum_{e: pair=r} n grad[tail] + m grad[head] for one pair r."""
    pid_r = tl.program_id(0).to(tl.int64)
    offs_c, mask_c = block_columns(BLOCK_C, num_columns)
    begin = tl.load(pair_rowptr_ptr + pid_r)
    end = tl.load(pair_rowptr_ptr + pid_r + 1)
    fwd = (pair_perm_ptr, tail_ptr, None, tail_count_ptr, None, grad_ptr, None)
    inv = (pair_perm_ptr, head_ptr, None, head_count_ptr, None, grad_ptr, None)
    total = sum_row(begin, end, offs_c, num_columns, fwd, chunk_fwd_ptr, BLOCK_E, BLOCK_C)
    total += sum_row(begin, end, offs_c, num_columns, inv, chunk_inv_ptr, BLOCK_E, BLOCK_C)
    offs = pid_r * num_columns + offs_c
    tl.store(d_table_ptr + offs, total.to(d_table_ptr.dtype.element_ty), mask=mask_c)


def relation_sum_bwd(grad: Tensor, index: list[Tensor]) -> Tensor:
    """Launches the gradient (see `dragkit::relation_sum_bwd`)."""
    facts, grad, num_columns = contiguous_index(index), grad.contiguous(), grad.shape[1]
    d_table = grad.new_empty(facts.num_pairs, num_columns)
    if d_table.numel() == 0:
        return d_table
    fwd = Summand(facts.pair_perm, facts.tail, None, facts.tail_count, None, grad)
    inv = Summand(facts.pair_perm, facts.head, None, facts.head_count, None, grad)
    # One program per pair: the rows of the tile are facts of the pair.
    tile = dot_tile(num_columns, grad.dtype)
    _relation_sum_bwd_kernel[tile.grid(facts.num_pairs * tile.rows, num_columns)](
        *(grad, facts.head, facts.tail, facts.pair_ptr, facts.pair_perm),
        *(facts.head_count, facts.tail_count),
        chunk_sums(facts.pair_ptr, facts.fact_pair, fwd),
        chunk_sums(facts.pair_ptr, facts.fact_pair, inv),
        *(d_table, num_columns),
        BLOCK_E=tile.rows,
        BLOCK_C=tile.columns,
        **tile.options,
    )
    return d_table


KERNELS = tuple(
    spec(
        _relation_sum_bwd_kernel,
        ResourceLimits(registers=80, shared_bytes=8192, vector_loads=4),
        tile=dot_tile(columns, DTYPES[dtype]),
        dtype=dtype,
        chunk_fwd_ptr=chunks,
        chunk_inv_ptr=chunks,
    )
    for columns in COLUMNS
    for chunks in (None, "*fp32")
    for dtype in DTYPES
)
