"""Sums over the whole chunks of long rows, for large packs.

One node or pair may have most facts of a pack. A single program would still add them long after the
others have finished. So separate programs first sum every whole chunk of CHUNK facts, counted from
the row's first fact. Others then sum the chunks of each row. The row's program reads one sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import KernelSpec, ResourceLimits, Tile2D, spec
from .row_sums import (
    CHUNK,
    COLUMNS,
    DTYPES,
    Summand,
    block_columns,
    dot_tile,
    sum_facts,
    sum_tile,
)

# A smaller pack has no row that is worth two more launches: `add_rows` sums it in parallel.
SPLIT_FACTS = 8192


@triton.jit
def _row_of_block(pid_b, rowptr_ptr, key_ptr, perm_ptr, CHUNK_E: tl.constexpr):
    """(begin, end) of the row of a block's last offset, and whether the row holds that offset."""
    last = (pid_b + 1) * CHUNK_E - 1
    fact = last
    if perm_ptr is not None:
        fact = tl.load(perm_ptr + last).to(tl.int64)
    row = tl.load(key_ptr + fact).to(tl.int64)
    begin = tl.load(rowptr_ptr + row)
    end = tl.load(rowptr_ptr + row + 1)
    # An offset of padding is in no row.
    return begin, end, (begin <= last) & (last < end)


@triton.jit
def _chunk_sums_fwd_kernel(
    rowptr_ptr,
    key_ptr,
    perm_ptr,
    row_ptr,
    sender_ptr,
    count_ptr,
    p_ptr,
    table_ptr,
    factor_ptr,
    chunk_ptr,
    num_columns,
    CHUNK_E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """chunk_b = sum over the whole chunk of a row that begins at an offset of block b.

    Block b has the offsets b CHUNK_E..(b+1) CHUNK_E-1. At most one whole chunk begins there, and it
    contains the block's last offset. Without such a chunk, chunk_b is not written, and no kernel
    reads it. With `factor`, a program stores one number for its block of columns.
    """
    pid_b = tl.program_id(0).to(tl.int64)
    row_begin, row_end, in_row = _row_of_block(pid_b, rowptr_ptr, key_ptr, perm_ptr, CHUNK_E)
    begin = row_begin + (pid_b - row_begin // CHUNK_E) * CHUNK_E
    end = begin + CHUNK_E
    if in_row & (end <= row_end):
        offs_c, mask_c = block_columns(BLOCK_C, num_columns)
        summand = (perm_ptr, row_ptr, sender_ptr, count_ptr, p_ptr, table_ptr, factor_ptr)
        total = sum_facts(begin, end, offs_c, num_columns, summand, BLOCK_E, BLOCK_C)
        if factor_ptr is None:
            tl.store(chunk_ptr + pid_b * num_columns + offs_c, total, mask=mask_c)
        else:
            offs = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + pid_b
            tl.store(chunk_ptr + offs, tl.sum(total, 0))


@triton.jit
def _chunk_sums_fwd_rows_kernel(
    rowptr_ptr,
    key_ptr,
    perm_ptr,
    chunk_ptr,
    num_columns,
    CHUNK_E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """chunk_b = sum of the adjacent chunks b, b+1, .. of one row, where b is its first chunk."""
    pid_b = tl.program_id(0).to(tl.int64)
    # The program of the row's first chunk adds them in place. A single chunk is complete already.
    begin, end, in_row = _row_of_block(pid_b, rowptr_ptr, key_ptr, perm_ptr, CHUNK_E)
    if in_row & (begin // CHUNK_E == pid_b) & (begin + 2 * CHUNK_E <= end):
        offs_c, mask_c = block_columns(BLOCK_C, num_columns)
        summand = (None, None, None, None, None, chunk_ptr, None)
        chunk_end = pid_b + (end - begin) // CHUNK_E
        total = sum_facts(pid_b, chunk_end, offs_c, num_columns, summand, BLOCK_E, BLOCK_C)
        tl.store(chunk_ptr + pid_b * num_columns + offs_c, total, mask=mask_c)


def chunk_sums(rowptr: Tensor, key: Tensor, summand: Summand) -> Tensor | None:
    """Sums the whole chunks of every row.

    Args:
        rowptr: int32 [V+1] first offset of each row.
        key: int32 row of each fact. Both are contiguous.
        summand: terms of the sums, see `Summand`.

    Returns:
        float32 [offsets / CHUNK, C], where row rowptr[v] / CHUNK belongs to v. With a factor the
        sums also run over the columns: [offsets / CHUNK]. Entries of no row are undefined. None for
        packs of fewer than SPLIT_FACTS facts.
    """
    table, has_factor = summand.table, summand.factor is not None
    num_offsets = (key if summand.perm is None else summand.perm).shape[0]
    num_columns = table.shape[1]
    if num_offsets < max(SPLIT_FACTS, CHUNK):
        return None
    tile = (dot_tile if has_factor else sum_tile)(num_columns, table.dtype)
    num_blocks, column_blocks = num_offsets // CHUNK, tile.grid(1, num_columns)[1]
    shape = (column_blocks, num_blocks) if has_factor else (num_blocks, num_columns)
    out = table.new_empty(shape, dtype=torch.float32)
    sizes = {"CHUNK_E": CHUNK, "BLOCK_E": tile.rows, "BLOCK_C": tile.columns}
    _chunk_sums_fwd_kernel[(num_blocks, column_blocks)](
        rowptr, key, *summand, out, num_columns, **sizes, **tile.options
    )
    # A dot over several column blocks is the sum of their numbers.
    if has_factor:
        out, num_columns = out.sum(0), 1
    tile = dot_tile(num_columns, torch.float32)
    sizes = {"CHUNK_E": CHUNK, "BLOCK_E": tile.rows, "BLOCK_C": tile.columns}
    _chunk_sums_fwd_rows_kernel[(num_blocks, tile.grid(1, num_columns)[1])](
        rowptr, key, summand.perm, out, num_columns, **sizes, **tile.options
    )
    return out


def _spec(
    kernel: object, tile: Tile2D, dtype: str, vector_loads: int, absent: tuple[str, ...]
) -> KernelSpec:
    limits = ResourceLimits(registers=80, shared_bytes=8192, vector_loads=vector_loads)
    constants = {"CHUNK_E": CHUNK}
    return spec(
        kernel, limits, tile=tile, dtype=dtype, constants=constants, **dict.fromkeys(absent)
    )


KERNELS = (
    *(
        _spec(_chunk_sums_fwd_kernel, tile(columns, DTYPES[dtype]), dtype, 4, absent)
        for columns in COLUMNS
        for dtype in DTYPES
        # Table rows weighted by p, table rows alone, dots with another table's rows, and nodes of a
        # graph.
        for tile, absent in (
            (sum_tile, ("factor_ptr",)),
            (sum_tile, ("factor_ptr", "p_ptr", "sender_ptr")),
            (dot_tile, ("p_ptr",)),
            (sum_tile, ("factor_ptr", "perm_ptr", "row_ptr", "sender_ptr", "count_ptr")),
        )
    ),
    *(
        _spec(_chunk_sums_fwd_rows_kernel, dot_tile(columns, torch.float32), "*fp32", 0, absent)
        for columns in COLUMNS
        for absent in ((), ("perm_ptr",))
    ),
)
