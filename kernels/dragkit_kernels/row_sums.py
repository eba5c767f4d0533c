"""Triton helpers: weighted sums of table rows, grouped by node, by pair or by graph.

message_passing and relation_sum share them. A "row" is one group, such as the facts with tail v.
Its facts are `perm[rowptr[v]:rowptr[v + 1]]`. Every sum runs in float32 and in that fixed sequence,
so results do not depend on scheduling.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Tile2D

# Facts of a row that a tile adds one after the other. The rest of a longer row is summed in
# parallel, in a large pack by programs of `chunk_sums`.
CHUNK = 64
_CHUNK = tl.constexpr(CHUNK)

# Columns to warps. A thread then holds 32 values of a tile of 32 rows.
_WARPS = {64: 2, 256: 8}
COLUMNS = tuple(_WARPS)
# The types that `aot` compiles: tables, states and gradients in one dtype, p in float32.
DTYPES = {"*bf16": torch.bfloat16, "*fp32": torch.float32}


def _tile(num_columns: int, dtype: torch.dtype, rows: int) -> Tile2D:
    """The narrowest tile that holds all columns, else the widest. Half as high for float32."""
    columns = next((width for width in COLUMNS if num_columns <= width), COLUMNS[-1])
    return Tile2D(rows if dtype.itemsize == 2 else rows // 2, columns, _WARPS[columns])


def layer_tile(num_columns: int, dtype: torch.dtype) -> Tile2D:
    """Tile of nodes by columns for the layer's forward, from the width and dtype of its tables."""
    return _tile(num_columns, dtype, rows=32)._replace(max_registers=128)


def sum_tile(num_columns: int, dtype: torch.dtype) -> Tile2D:
    """Tile of facts by columns for sums of table rows."""
    return _tile(num_columns, dtype, rows=32)


def dot_tile(num_columns: int, dtype: torch.dtype) -> Tile2D:
    """Tile of half the height, for kernels that gather two rows per fact or run once a step."""
    return _tile(num_columns, dtype, rows=16)


class Summand(NamedTuple):
    """The terms of a row's sum: tensors for a launch, in a kernel the tuple of their pointers.

    The fact at offset i is f = perm[i]. It adds

        count[f] p[sender[f]] table[row[f]] factor[sender[f]].

    A field may be None: without `perm` f is i, without `row` or `sender` they are f, and without
    `count`, `p` or `factor` that factor is one.

    Attributes:
        perm: int32 fact at each offset.
        row: int32 [E] row of `table` of each fact.
        sender: int32 [E] node of each fact.
        count: int32 [E] multiplicity of each fact.
        p: float weight of each node.
        table, factor: float [*, C]. All tensors are contiguous.
    """

    perm: Tensor | None
    row: Tensor | None
    sender: Tensor | None
    count: Tensor | None
    p: Tensor | None
    table: Tensor
    factor: Tensor | None = None


@triton.jit
def block_rows(BLOCK: tl.constexpr, num_rows):
    """(row offsets of this program on axis 0, their mask)."""
    # int64, since a row times the width can exceed 2^31.
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return offs_n, offs_n < num_rows


@triton.jit
def block_columns(BLOCK_C: tl.constexpr, num_columns):
    """(column offsets of this program on axis 1, their mask)."""
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return offs_c, offs_c < num_columns


@triton.jit
def _row_bounds(offs_n, mask_n, rowptr_ptr):
    """(first offset, number of facts) of each row. A masked row has no facts."""
    begin = tl.load(rowptr_ptr + offs_n, mask=mask_n, other=0)
    return begin, tl.load(rowptr_ptr + offs_n + 1, mask=mask_n, other=0) - begin


@triton.jit
def _add_facts(acc, offs_e, mask_e, offs_c, num_columns, summand):
    """acc_i += the term of the fact at offs_e[i], in every lane i of the mask."""
    perm_ptr, row_ptr, sender_ptr, count_ptr, p_ptr, table_ptr, factor_ptr = summand
    fact = offs_e
    if perm_ptr is not None:
        fact = tl.load(perm_ptr + offs_e, mask=mask_e, other=0)
    row = fact
    if row_ptr is not None:
        row = tl.load(row_ptr + fact, mask=mask_e, other=0)
    sender = fact
    if sender_ptr is not None:
        sender = tl.load(sender_ptr + fact, mask=mask_e, other=0)
    weight = mask_e.to(tl.float32)
    if count_ptr is not None:
        weight = tl.load(count_ptr + fact, mask=mask_e, other=0).to(tl.float32)
    if p_ptr is not None:
        weight *= tl.load(p_ptr + sender, mask=mask_e, other=0.0).to(tl.float32)
    # A masked lane reads zeros: it must not multiply a NaN of row 0 by its zero weight.
    mask = mask_e[:, None] & (offs_c < num_columns)[None, :]
    offs = row[:, None].to(tl.int64) * num_columns + offs_c[None, :]
    value = tl.load(table_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if factor_ptr is not None:
        offs = sender[:, None].to(tl.int64) * num_columns + offs_c[None, :]
        value *= tl.load(factor_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return tl.fma(weight[:, None], value, acc)


@triton.jit
def sum_facts(begin, end, offs_c, num_columns, summand, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_C] sum over the offsets begin..end-1, BLOCK facts at a time."""
    # Lane i adds every BLOCK-th fact. One reduction at the end keeps the order fixed.
    acc = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for start in range(begin, end, BLOCK):
        offs_e = start + tl.arange(0, BLOCK)
        acc = _add_facts(acc, offs_e, offs_e < end, offs_c, num_columns, summand)
    return tl.sum(acc, 0)


@triton.jit
def sum_row(
    begin, end, offs_c, num_columns, summand, chunk_ptr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """[BLOCK_C] sum over the facts of one row. With `chunk` it reads the sum of whole chunks."""
    rest_begin = begin
    if chunk_ptr is not None:
        rest_begin = begin + (end - begin) // _CHUNK * _CHUNK
    total = sum_facts(rest_begin, end, offs_c, num_columns, summand, BLOCK, BLOCK_C)
    # Two conditions, because only the first is known at compile time.
    if chunk_ptr is not None:  # noqa: SIM102
        if rest_begin > begin:
            offs = (begin // _CHUNK).to(tl.int64) * num_columns + offs_c
            total += tl.load(chunk_ptr + offs, mask=offs_c < num_columns, other=0.0)
    return total


@triton.jit
def _add_long_rows(
    acc, begin, size, offs_c, num_columns, summand, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """acc_i += sum over the offsets begin_i..begin_i+size_i-1, one lane after the other."""
    lane = tl.arange(0, BLOCK)
    if tl.max(size, 0) > 0:
        for i in range(0, BLOCK):
            first = tl.sum(tl.where(lane == i, begin, 0), 0)
            num_facts = tl.sum(tl.where(lane == i, size, 0), 0)
            if num_facts > 0:
                # Registers are left for half a tile beside `acc`.
                total = sum_facts(
                    first, first + num_facts, offs_c, num_columns, summand, BLOCK // 2, BLOCK_C
                )
                acc += tl.where(lane[:, None] == i, total[None, :], 0.0)
    return acc


@triton.jit
def add_rows(
    acc,
    offs_n,
    mask_n,
    offs_c,
    num_columns,
    rowptr_ptr,
    summand,
    CHUNKED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """acc_v += sum over the facts of row v, for a tile of rows v.

    Step j adds the j-th fact of every row of the tile. A long row would make the others wait. With
    CHUNKED its whole chunks are left to `add_chunks`. Otherwise its facts after the first chunk are
    summed in parallel.
    """
    begin, size = _row_bounds(offs_n, mask_n, rowptr_ptr)
    # The steps take the facts after the whole chunks, or the first chunk.
    if CHUNKED:
        num_steps = size % _CHUNK
        begin += size - num_steps
    else:
        num_steps = tl.minimum(size, _CHUNK)
    for j in range(0, tl.max(num_steps, 0)):
        acc = _add_facts(acc, begin + j, j < num_steps, offs_c, num_columns, summand)
    if not CHUNKED:
        acc = _add_long_rows(
            acc, begin + _CHUNK, size - num_steps, offs_c, num_columns, summand, BLOCK, BLOCK_C
        )
    return acc


@triton.jit
def chunk_rows(offs_n, mask_n, rowptr_ptr):
    """(row of `chunk` of each row v of a tile, mask of the rows that have whole chunks)."""
    begin, size = _row_bounds(offs_n, mask_n, rowptr_ptr)
    return (begin // _CHUNK).to(tl.int64), size >= _CHUNK


@triton.jit
def add_chunks(acc, offs_n, mask_n, offs_c, num_columns, rowptr_ptr, chunk_ptr):
    """acc_v += the sum of the chunks that `add_rows` with CHUNKED leaves out."""
    row, has_chunks = chunk_rows(offs_n, mask_n, rowptr_ptr)
    # Few tiles have chunks. The branch also keeps these loads from adding to the register peak.
    if tl.max(has_chunks.to(tl.int32), 0) > 0:
        mask = has_chunks[:, None] & (offs_c < num_columns)[None, :]
        offs = row[:, None] * num_columns + offs_c[None, :]
        acc += tl.load(chunk_ptr + offs, mask=mask, other=0.0)
    return acc
