"""Triton helpers: weighted sums of table rows over the facts of a row of a FactIndex order.

Every sum runs in float32 and in the order's own sequence, so results do not depend on scheduling.

"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# Facts of a row that its tile walks one by one. The rest of a longer row is summed side by side, in
# a large pack by programs of its own.
CHUNK = 64
_CHUNK = tl.constexpr(CHUNK)


class Summand(NamedTuple):
    """What is summed: tensors for a launch, the tuple of their pointers in a kernel.

    The fact at offset i of an order is f = perm[i]. It adds

        count[f] p[sender[f]] table[row[f]] factor[sender[f]].

    None leaves a part out: without perm f is i, without row or sender they are f, without count, p
    or factor these are one.

    Attributes:
        perm: int32, fact of each offset; row: int32, row of `table` of each fact.
        sender: int32, node of each fact; count: int32, number of each fact; p: float of each node.
        table, factor: float [*, C]. All are contiguous.
    """

    perm: Tensor | None
    row: Tensor | None
    sender: Tensor | None
    count: Tensor | None
    p: Tensor | None
    table: Tensor
    factor: Tensor | None = None


@triton.jit
def block_rows(BLOCK: tl.constexpr, size):
    """(rows of this program on axis 0, which of them exist); int64, so that products fit."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return offs_n, offs_n < size


@triton.jit
def block_columns(BLOCK_C: tl.constexpr, size):
    """(columns of this program on axis 1, which of them exist)."""
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return offs_c, offs_c < size


@triton.jit
def _row_bounds(offs_n, mask_n, rowptr_ptr):
    """(first offset, number of facts) of each row; a row that does not exist has no facts."""
    begin = tl.load(rowptr_ptr + offs_n, mask=mask_n, other=0)
    return begin, tl.load(rowptr_ptr + offs_n + 1, mask=mask_n, other=0) - begin


@triton.jit
def _add_facts(acc, offs, live, offs_c, num_columns, summand):
    """acc_i += what the fact at offs_i adds, in every lane i that is live."""
    perm_ptr, row_ptr, sender_ptr, count_ptr, p_ptr, table_ptr, factor_ptr = summand
    fact = offs
    if perm_ptr is not None:
        fact = tl.load(perm_ptr + offs, mask=live, other=0)
    row = fact
    if row_ptr is not None:
        row = tl.load(row_ptr + fact, mask=live, other=0)
    sender = fact
    if sender_ptr is not None:
        sender = tl.load(sender_ptr + fact, mask=live, other=0)
    weight = live.to(tl.float32)
    if count_ptr is not None:
        weight = tl.load(count_ptr + fact, mask=live, other=0).to(tl.float32)
    if p_ptr is not None:
        weight *= tl.load(p_ptr + sender, mask=live, other=0.0).to(tl.float32)
    mask = live[:, None] & (offs_c < num_columns)[None, :]
    at = row[:, None].to(tl.int64) * num_columns + offs_c[None, :]
    value = tl.load(table_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if factor_ptr is not None:
        at = sender[:, None].to(tl.int64) * num_columns + offs_c[None, :]
        value *= tl.load(factor_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return tl.fma(weight[:, None], value, acc)


@triton.jit
def sum_facts(begin, end, offs_c, num_columns, summand, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_C] sum over the offsets begin..end, BLOCK facts side by side."""
    part = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for start in range(begin, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        part = _add_facts(part, offs, offs < end, offs_c, num_columns, summand)
    return tl.sum(part, 0)


@triton.jit
def sum_row(
    begin, end, offs_c, num_columns, summand, chunk_ptr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """[BLOCK_C] sum over the facts of one row. With chunks, that of its whole ones is read."""
    rest = begin
    if chunk_ptr is not None:
        rest = begin + (end - begin) // _CHUNK * _CHUNK
    total = sum_facts(rest, end, offs_c, num_columns, summand, BLOCK, BLOCK_C)
    # Two conditions: the first is known when the kernel is compiled.
    if chunk_ptr is not None:  # noqa: SIM102
        if rest > begin:
            at = (begin // _CHUNK).to(tl.int64) * num_columns + offs_c
            total += tl.load(chunk_ptr + at, mask=offs_c < num_columns, other=0.0)
    return total


@triton.jit
def _add_long_rows(
    acc, begin, size, offs_c, num_columns, summand, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """acc_i += sum over the offsets begin_i..begin_i+size_i, for the few lanes with facts left.

    BLOCK / 2 facts at a time: beside the tile there are registers for half of one more.
    """
    lane = tl.arange(0, BLOCK)
    if tl.max(size, 0) > 0:
        for i in range(0, BLOCK):
            first = tl.sum(tl.where(lane == i, begin, 0), 0)
            facts = tl.sum(tl.where(lane == i, size, 0), 0)
            if facts > 0:
                end = first + facts
                rest = sum_facts(first, end, offs_c, num_columns, summand, BLOCK // 2, BLOCK_C)
                acc += tl.where(lane[:, None] == i, rest[None, :], 0.0)
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

    The j-th facts of all rows go together. A long row would keep the others waiting: with CHUNKED
    its whole chunks are left to `add_chunks`, else all but the first are summed side by side.
    """
    begin, size = _row_bounds(offs_n, mask_n, rowptr_ptr)
    if CHUNKED:
        num_stepped = size % _CHUNK
        begin += size - num_stepped
    else:
        num_stepped = tl.minimum(size, _CHUNK)
    for j in range(0, tl.max(num_stepped, 0)):
        acc = _add_facts(acc, begin + j, j < num_stepped, offs_c, num_columns, summand)
    if not CHUNKED:
        rest = size - num_stepped
        acc = _add_long_rows(
            acc, begin + _CHUNK, rest, offs_c, num_columns, summand, BLOCK, BLOCK_C
        )
    return acc


@triton.jit
def chunk_rows(offs_n, mask_n, rowptr_ptr):
    """(row of `chunk` for each of a tile of rows v, whether v has whole chunks)."""
    begin, size = _row_bounds(offs_n, mask_n, rowptr_ptr)
    return (begin // _CHUNK).to(tl.int64), size >= _CHUNK


@triton.jit
def add_chunks(acc, offs_n, mask_n, offs_c, num_columns, rowptr_ptr, chunk_ptr):
    """acc_v += the sum of the chunks that a CHUNKED add_rows leaves out."""
    row, live = chunk_rows(offs_n, mask_n, rowptr_ptr)
    # Most tiles have none. The branch also keeps the registers of these loads apart from others.
    if tl.max(live.to(tl.int32), 0) > 0:
        mask = live[:, None] & (offs_c < num_columns)[None, :]
        at = row[:, None] * num_columns + offs_c[None, :]
        acc += tl.load(chunk_ptr + at, mask=mask, other=0.0)
    return acc
