"""Triton forward of relation_sum: both directions of a tile of nodes in one program."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..chunk_sums import chunk_sums
from ..launch import ResourceLimits, spec
from ..orders import contiguous_index
from ..row_sums import (
    COLUMNS,
    DTYPES,
    Summand,
    add_chunks,
    add_rows,
    block_columns,
    block_rows,
    dot_tile,
)


@triton.jit(do_not_specialize=["num_nodes"])
def _relation_sum_fwd_kernel(
    table_ptr,
    tail_rowptr_ptr,
    tail_perm_ptr,
    head_rowptr_ptr,
    head_perm_ptr,
    fact_pair_ptr,
    head_count_ptr,
    tail_count_ptr,
    chunk_in_ptr,
    chunk_out_ptr,
    out_ptr,
    num_nodes,
    num_columns,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out_v = sum_{e: tail=v} n table[pair] + sum_{e: head=v} m table[pair] for a tile of nodes."""
    offs_n, mask_n = block_rows(BLOCK_N, num_nodes)
    offs_c, mask_c = block_columns(BLOCK_C, num_columns)
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    # Incoming facts, then outgoing ones, then chunks: the order of the sum is fixed.
    summand = (tail_perm_ptr, fact_pair_ptr, None, tail_count_ptr, None, table_ptr, None)
    acc = add_rows(
        acc, offs_n, mask_n, offs_c, num_columns, tail_rowptr_ptr, summand,
        chunk_in_ptr is not None, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    summand = (head_perm_ptr, fact_pair_ptr, None, head_count_ptr, None, table_ptr, None)
    acc = add_rows(
        acc, offs_n, mask_n, offs_c, num_columns, head_rowptr_ptr, summand,
        chunk_out_ptr is not None, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    if chunk_in_ptr is not None:
        acc = add_chunks(acc, offs_n, mask_n, offs_c, num_columns, tail_rowptr_ptr, chunk_in_ptr)
        acc = add_chunks(acc, offs_n, mask_n, offs_c, num_columns, head_rowptr_ptr, chunk_out_ptr)
    offs = offs_n[:, None] * num_columns + offs_c[None, :]
    mask = mask_n[:, None] & mask_c[None, :]
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def relation_sum_fwd(table: Tensor, index: list[Tensor]) -> Tensor:
    """Launches the sum (see `dragkit::relation_sum_fwd`)."""
    facts, table = contiguous_index(index), table.contiguous()
    num_nodes, num_columns = facts.num_nodes, table.shape[1]
    out = table.new_empty(num_nodes, num_columns)
    if out.numel() == 0:
        return out
    incoming = Summand(facts.tail_perm, facts.fact_pair, None, facts.tail_count, None, table)
    outgoing = Summand(facts.head_perm, facts.fact_pair, None, facts.head_count, None, table)
    tile = dot_tile(num_columns, table.dtype)
    _relation_sum_fwd_kernel[tile.grid(num_nodes, num_columns)](
        *(table, facts.tail_ptr, facts.tail_perm, facts.head_ptr, facts.head_perm),
        *(facts.fact_pair, facts.head_count, facts.tail_count),
        chunk_sums(facts.tail_ptr, facts.tail, incoming),
        chunk_sums(facts.head_ptr, facts.head, outgoing),
        *(out, num_nodes, num_columns),
        BLOCK_N=tile.rows,
        BLOCK_C=tile.columns,
        **tile.options,
    )
    return out


KERNELS = tuple(
    spec(
        _relation_sum_fwd_kernel,
        ResourceLimits(80, shared_bytes=8192, vector_loads=4),
        tile=dot_tile(columns, DTYPES[dtype]),
        dtype=dtype,
        chunk_in_ptr=chunks,
        chunk_out_ptr=chunks,
    )
    for columns in COLUMNS
    for chunks in (None, "*fp32")
    for dtype in DTYPES
)
