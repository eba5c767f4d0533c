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

from ..launch import Budget, KernelSpec
from .tiles import COLUMNS, DTYPES, dot_tile, sum_tile, wide_spec
from .walk import CHUNK, sum_slots

# Smaller packs save the launch: half a tile of facts at a time, their longest rows are short.
SPLIT_FACTS = 8192


@triton.jit
def _row_of_block(pid_b, ptr_ptr, key_ptr, order_ptr, CHUNK_E: tl.constexpr):
    """(begin, end) of the row of a block's last slot, and whether the slot is in it.

    Slots of padding are in no row.
    """
    last = (pid_b + 1) * CHUNK_E - 1
    fact = last
    if order_ptr is not None:
        fact = tl.load(order_ptr + last).to(tl.int64)
    row = tl.load(key_ptr + fact).to(tl.int64)
    begin = tl.load(ptr_ptr + row)
    end = tl.load(ptr_ptr + row + 1)
    return begin, end, (begin <= last) & (last < end)


@triton.jit
def _message_passing_fwd_chunks_kernel(
    ptr_ptr,
    key_ptr,
    order_ptr,
    row_ptr,
    end_ptr,
    count_ptr,
    p_ptr,
    table_ptr,
    other_ptr,
    chunk_ptr,
    num_columns,
    CHUNK_E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """chunk_b = sum over the one whole chunk of a row that begins in slots b CHUNK..(b+1) CHUNK.

    Such a chunk holds the last of these slots, and there is no other. Where none begins, chunk_b is
    left as it is: nobody reads it. With `other` it is one number for each block of columns.
    """
    pid_b = tl.program_id(0).to(tl.int64)
    row_begin, row_end, inside = _row_of_block(pid_b, ptr_ptr, key_ptr, order_ptr, CHUNK_E)
    begin = row_begin + (pid_b - row_begin // CHUNK_E) * CHUNK_E
    if inside & (begin + CHUNK_E <= row_end):
        offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = offs_c < num_columns
        total = sum_slots(
            begin, begin + CHUNK_E, offs_c, mask_c, num_columns, order_ptr, row_ptr, end_ptr,
            count_ptr, p_ptr, table_ptr, other_ptr, BLOCK_E, BLOCK_C,
        )  # fmt: skip
        if other_ptr is None:
            tl.store(chunk_ptr + pid_b * num_columns + offs_c, total, mask=mask_c)
        else:
            at = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + pid_b
            tl.store(chunk_ptr + at, tl.sum(total, 0))


@triton.jit
def _message_passing_fwd_row_chunks_kernel(
    ptr_ptr,
    key_ptr,
    order_ptr,
    chunk_ptr,
    num_columns,
    CHUNK_E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """chunk_b = sum of all chunks of a row, for the first of them: b. They lie side by side."""
    pid_b = tl.program_id(0).to(tl.int64)
    begin, end, inside = _row_of_block(pid_b, ptr_ptr, key_ptr, order_ptr, CHUNK_E)
    if inside & (begin // CHUNK_E == pid_b) & (begin + 2 * CHUNK_E <= end):
        offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = offs_c < num_columns
        total = sum_slots(
            pid_b, pid_b + (end - begin) // CHUNK_E, offs_c, mask_c, num_columns, None, None, None,
            None, None, chunk_ptr, None, BLOCK_E, BLOCK_C,
        )  # fmt: skip
        tl.store(chunk_ptr + pid_b * num_columns + offs_c, total, mask=mask_c)


def chunk_sums(
    ptr: Tensor,
    key: Tensor,
    order: Tensor | None,
    row: Tensor | None,
    end: Tensor | None,
    count: Tensor | None,
    p: Tensor | None,
    table: Tensor,
    other: Tensor | None = None,
) -> Tensor | None:
    """float32 [slots / CHUNK, C], the sum of row v's chunks at ptr[v] / CHUNK.

    None for a small pack. With `other` [slots / CHUNK], summed over the columns. Places of no row
    hold anything.

    Args:
        ptr: int32 [V+1] slots of each row; key: int32, row of a fact; order: int32, fact of a slot.
        row, end, count, p, table, other: of the facts, see `add_facts`. All contiguous.
    """
    num_slots, num_columns = (key if order is None else order).shape[0], table.shape[1]
    if num_slots < max(SPLIT_FACTS, CHUNK):
        return None
    tile = (sum_tile if other is None else dot_tile)(num_columns, table.dtype)
    grid = (num_slots // CHUNK, tile.grid(1, num_columns)[1])
    shape = (grid[0], num_columns) if other is None else grid[::-1]
    out = table.new_empty(shape, dtype=torch.float32)
    _message_passing_fwd_chunks_kernel[grid](
        ptr,
        key,
        order,
        row,
        end,
        count,
        p,
        table,
        other,
        out,
        num_columns,
        CHUNK_E=CHUNK,
        BLOCK_E=tile.rows,
        BLOCK_C=tile.columns,
        **tile.options,
    )
    out = out if other is None else out.sum(0)
    tile = dot_tile(1 if other is not None else num_columns, torch.float32)
    _message_passing_fwd_row_chunks_kernel[(grid[0], tile.grid(1, out[0].numel())[1])](
        ptr,
        key,
        order,
        out,
        out[0].numel(),
        CHUNK_E=CHUNK,
        BLOCK_E=tile.rows,
        BLOCK_C=tile.columns,
        **tile.options,
    )
    return out


_EVERY = ("key_ptr", "order_ptr", "row_ptr", "end_ptr", "count_ptr", "ptr_ptr")


def _spec(columns: int, kind: str, absent: tuple[str, ...]) -> KernelSpec:
    types = dict.fromkeys(_EVERY, "*i32") | {"chunk_ptr": "*fp32"}
    return wide_spec(
        _message_passing_fwd_chunks_kernel,
        kind,
        (sum_tile if "other_ptr" in absent else dot_tile)(columns, DTYPES[kind]),
        "BLOCK_E",
        Budget(registers=80, shared=8192, wide_loads=4),
        types | dict.fromkeys(absent),
        {"CHUNK_E": CHUNK},
    )


# Sums of table rows by p, with and without; of products with another table's; of nodes.
_SUMS = (
    ("other_ptr",),
    ("other_ptr", "p_ptr"),
    ("p_ptr",),
    ("other_ptr", "order_ptr", "row_ptr", "end_ptr", "count_ptr"),
)
KERNELS = (
    *(_spec(columns, kind, absent) for columns in COLUMNS for kind in DTYPES for absent in _SUMS),
    *(
        wide_spec(
            _message_passing_fwd_row_chunks_kernel,
            "*fp32",
            dot_tile(columns, torch.float32),
            "BLOCK_E",
            Budget(registers=80, shared=8192),
            {"ptr_ptr": "*i32", "key_ptr": "*i32", "order_ptr": order, "chunk_ptr": "*fp32"},
            {"CHUNK_E": CHUNK},
        )
        for columns in COLUMNS
        for order in ("*i32", None)
    ),
)
