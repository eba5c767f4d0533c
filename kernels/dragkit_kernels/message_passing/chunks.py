"""Long rows of a large pack: sums of their chunks by programs of their own.

A node or pair may have most facts of a pack. One program would walk them alone long after the
others are done, so whole chunks of CHUNK facts are summed beforehand, counted from the begin of the
row, and then the chunks of each row: its program reads one sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import KernelSpec, ResourceLimits, Tile2D, spec
from .tiles import COLUMNS, DTYPES, dot_tile, sum_tile
from .walk import CHUNK, Summand, block_columns, sum_facts

# Smaller packs save the launch: half a tile of facts at a time, their longest rows are short.
SPLIT_FACTS = 8192


@triton.jit
def _row_of_block(pid_b, rowptr_ptr, key_ptr, perm_ptr, CHUNK_E: tl.constexpr):
    """(begin, end) of the row of a block's last offset, and whether the offset is in it.

    Offsets of padding are in no row.
    """
    last = (pid_b + 1) * CHUNK_E - 1
    fact = last
    if perm_ptr is not None:
        fact = tl.load(perm_ptr + last).to(tl.int64)
    row = tl.load(key_ptr + fact).to(tl.int64)
    begin = tl.load(rowptr_ptr + row)
    end = tl.load(rowptr_ptr + row + 1)
    return begin, end, (begin <= last) & (last < end)


@triton.jit
def _message_passing_fwd_chunks_kernel(
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
    """chunk_b = sum over the one whole chunk of a row that begins at offsets b CHUNK..(b+1) CHUNK.

    Such a chunk holds the last of these offsets, and there is no other. Where none begins, chunk_b
    is left as it is: nobody reads it. With a factor it is one number for each block of columns.
    """
    pid_b = tl.program_id(0).to(tl.int64)
    row_begin, row_end, inside = _row_of_block(pid_b, rowptr_ptr, key_ptr, perm_ptr, CHUNK_E)
    begin = row_begin + (pid_b - row_begin // CHUNK_E) * CHUNK_E
    end = begin + CHUNK_E
    if inside & (end <= row_end):
        offs_c, mask_c = block_columns(BLOCK_C, num_columns)
        summand = (perm_ptr, row_ptr, sender_ptr, count_ptr, p_ptr, table_ptr, factor_ptr)
        total = sum_facts(begin, end, offs_c, num_columns, summand, BLOCK_E, BLOCK_C)
        if factor_ptr is None:
            tl.store(chunk_ptr + pid_b * num_columns + offs_c, total, mask=mask_c)
        else:
            at = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + pid_b
            tl.store(chunk_ptr + at, tl.sum(total, 0))


@triton.jit
def _message_passing_fwd_row_chunks_kernel(
    rowptr_ptr,
    key_ptr,
    perm_ptr,
    chunk_ptr,
    num_columns,
    CHUNK_E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """chunk_b = sum of all chunks of a row, for the first of them: b. They lie side by side."""
    pid_b = tl.program_id(0).to(tl.int64)
    begin, end, inside = _row_of_block(pid_b, rowptr_ptr, key_ptr, perm_ptr, CHUNK_E)
    if inside & (begin // CHUNK_E == pid_b) & (begin + 2 * CHUNK_E <= end):
        offs_c, mask_c = block_columns(BLOCK_C, num_columns)
        summand = (None, None, None, None, None, chunk_ptr, None)
        last = pid_b + (end - begin) // CHUNK_E
        total = sum_facts(pid_b, last, offs_c, num_columns, summand, BLOCK_E, BLOCK_C)
        tl.store(chunk_ptr + pid_b * num_columns + offs_c, total, mask=mask_c)


def chunk_sums(rowptr: Tensor, key: Tensor, summand: Summand) -> Tensor | None:
    """Sums of the whole chunks of rows; None for a small pack.

    Args:
        rowptr: int32 [V+1] first offset of each row; key: int32, row of each fact. Contiguous.
        summand: what is summed.

    Returns:
        float32 [offsets / CHUNK, C], with that of row v at rowptr[v] / CHUNK. With a factor it is
        summed over the columns, [offsets / CHUNK]. Places of no row hold anything.
    """
    table, dots = summand.table, summand.factor is not None
    num_offsets, num_columns = (
        (key if summand.perm is None else summand.perm).shape[0],
        table.shape[1],
    )
    if num_offsets < max(SPLIT_FACTS, CHUNK):
        return None
    tile = (dot_tile if dots else sum_tile)(num_columns, table.dtype)
    grid = (num_offsets // CHUNK, tile.grid(1, num_columns)[1])
    out = table.new_empty(grid[::-1] if dots else (grid[0], num_columns), dtype=torch.float32)
    sizes = {"CHUNK_E": CHUNK, "BLOCK_E": tile.rows, "BLOCK_C": tile.columns}
    _message_passing_fwd_chunks_kernel[grid](
        rowptr, key, *summand, out, num_columns, **sizes, **tile.options
    )
    if dots:
        out, num_columns = out.sum(0), 1
    tile = dot_tile(num_columns, torch.float32)
    sizes = {"CHUNK_E": CHUNK, "BLOCK_E": tile.rows, "BLOCK_C": tile.columns}
    grid = (grid[0], tile.grid(1, num_columns)[1])
    _message_passing_fwd_row_chunks_kernel[grid](
        rowptr, key, summand.perm, out, num_columns, **sizes, **tile.options
    )
    return out


def _spec(
    kernel: object, tile: Tile2D, dtype: str, vector_loads: int, absent: tuple[str, ...]
) -> KernelSpec:
    return spec(
        kernel,
        ResourceLimits(registers=80, shared_bytes=8192, vector_loads=vector_loads),
        tile=tile,
        dtype=dtype,
        constants={"CHUNK_E": CHUNK},
        **dict.fromkeys(absent),
    )


KERNELS = (
    *(
        _spec(_message_passing_fwd_chunks_kernel, tile(columns, DTYPES[dtype]), dtype, 4, absent)
        for columns in COLUMNS
        for dtype in DTYPES
        # Sums of table rows, with p and without; of products with another table's rows; of nodes.
        for tile, absent in (
            (sum_tile, ("factor_ptr",)),
            (sum_tile, ("factor_ptr", "p_ptr")),
            (dot_tile, ("p_ptr",)),
            (sum_tile, ("factor_ptr", "perm_ptr", "row_ptr", "sender_ptr", "count_ptr")),
        )
    ),
    *(
        _spec(
            _message_passing_fwd_row_chunks_kernel,
            dot_tile(columns, torch.float32),
            "*fp32",
            0,
            absent,
        )
        for columns in COLUMNS
        for absent in ((), ("perm_ptr",))
    ),
)
