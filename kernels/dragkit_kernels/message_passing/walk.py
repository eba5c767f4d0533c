"""Triton helpers: weighted sums of table rows over the facts of a row of a FactOrders order.

Every sum runs in float32 and in the order's own sequence, so results do not depend on scheduling.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Facts of a row that its tile walks one by one; those of a longer row are summed side by side, in a
# large pack by programs of their own.
CHUNK = 64
_CHUNK = tl.constexpr(CHUNK)


@triton.jit
def block_rows(BLOCK: tl.constexpr, size):
    """(rows of this program on axis 0, which of them exist); int64, so that products fit."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return offs_n, offs_n < size


@triton.jit
def add_facts(
    acc,
    slot,
    live,
    offs_c,
    mask_c,
    num_columns,
    order_ptr,
    row_ptr,
    end_ptr,
    count_ptr,
    p_ptr,
    table_ptr,
    other_ptr,
):
    """acc_i += n_f p[end_f] table[row_f] for the fact f = order[slot_i] of every live lane i.

    Without an order f is the slot, without rows or ends they are f, without counts or p these
    factors are one; with `other` the table's row is multiplied by other[end_f].
    """
    fact = slot
    if order_ptr is not None:
        fact = tl.load(order_ptr + slot, mask=live, other=0)
    row = fact
    if row_ptr is not None:
        row = tl.load(row_ptr + fact, mask=live, other=0)
    end = fact
    if end_ptr is not None:
        end = tl.load(end_ptr + fact, mask=live, other=0)
    weight = live.to(tl.float32)
    if count_ptr is not None:
        weight = tl.load(count_ptr + fact, mask=live, other=0).to(tl.float32)
    if p_ptr is not None:
        weight *= tl.load(p_ptr + end, mask=live, other=0.0).to(tl.float32)
    mask = live[:, None] & mask_c[None, :]
    at = row[:, None].to(tl.int64) * num_columns + offs_c[None, :]
    value = tl.load(table_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if other_ptr is not None:
        at = end[:, None].to(tl.int64) * num_columns + offs_c[None, :]
        value *= tl.load(other_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return tl.fma(weight[:, None], value, acc)


@triton.jit
def sum_slots(
    begin,
    end,
    offs_c,
    mask_c,
    num_columns,
    order_ptr,
    row_ptr,
    end_ptr,
    count_ptr,
    p_ptr,
    table_ptr,
    other_ptr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """[BLOCK_C] sum over the slots begin..end, BLOCK facts side by side."""
    lane = tl.arange(0, BLOCK)
    part = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for start in range(begin, end, BLOCK):
        slot = start + lane
        part = add_facts(
            part,
            slot,
            slot < end,
            offs_c,
            mask_c,
            num_columns,
            order_ptr,
            row_ptr,
            end_ptr,
            count_ptr,
            p_ptr,
            table_ptr,
            other_ptr,
        )
    return tl.sum(part, 0)


@triton.jit
def sum_row(
    begin,
    end,
    offs_c,
    mask_c,
    num_columns,
    order_ptr,
    row_ptr,
    end_ptr,
    count_ptr,
    p_ptr,
    table_ptr,
    other_ptr,
    chunk_ptr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """[BLOCK_C] sum over the slots of one row; that of its whole chunks is read, if there are."""
    rest = begin
    if chunk_ptr is not None:
        rest = begin + (end - begin) // _CHUNK * _CHUNK
    total = sum_slots(
        rest,
        end,
        offs_c,
        mask_c,
        num_columns,
        order_ptr,
        row_ptr,
        end_ptr,
        count_ptr,
        p_ptr,
        table_ptr,
        other_ptr,
        BLOCK,
        BLOCK_C,
    )
    # Not one condition: the first is known when the kernel is compiled.
    if chunk_ptr is not None:  # noqa: SIM102
        if rest > begin:
            at = (begin // _CHUNK).to(tl.int64) * num_columns + offs_c
            total += tl.load(chunk_ptr + at, mask=mask_c, other=0.0)
    return total


@triton.jit
def _add_long_rows(
    acc,
    begin,
    size,
    offs_c,
    mask_c,
    num_columns,
    order_ptr,
    row_ptr,
    end_ptr,
    count_ptr,
    p_ptr,
    table_ptr,
    other_ptr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """acc_i += sum over the slots begin_i..begin_i+size_i, for the few lanes with a size above 0.

    BLOCK / 2 facts at a time: beside the tile there are registers for half of one more.
    """
    lane = tl.arange(0, BLOCK)
    if tl.max(size, 0) > 0:
        for i in range(0, BLOCK):
            first = tl.sum(tl.where(lane == i, begin, 0), 0)
            facts = tl.sum(tl.where(lane == i, size, 0), 0)
            if facts > 0:
                rest = sum_slots(
                    first,
                    first + facts,
                    offs_c,
                    mask_c,
                    num_columns,
                    order_ptr,
                    row_ptr,
                    end_ptr,
                    count_ptr,
                    p_ptr,
                    table_ptr,
                    other_ptr,
                    BLOCK // 2,
                    BLOCK_C,
                )
                acc += tl.where(lane[:, None] == i, rest[None, :], 0.0)
    return acc


@triton.jit
def add_rows(
    acc,
    offs_n,
    mask_n,
    offs_c,
    mask_c,
    num_columns,
    ptr_ptr,
    order_ptr,
    row_ptr,
    end_ptr,
    count_ptr,
    p_ptr,
    table_ptr,
    other_ptr,
    CHUNKED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """acc_v += sum of add_facts over the slots ptr[v]..ptr[v+1], for a tile of rows v.

    The j-th facts of all rows go together. A long row would keep the others waiting: with CHUNKED
    its whole chunks are left to `add_chunks`, else all but the first are summed side by side.
    """
    begin = tl.load(ptr_ptr + offs_n, mask=mask_n, other=0)
    size = tl.load(ptr_ptr + offs_n + 1, mask=mask_n, other=0) - begin
    if CHUNKED:
        walked = size % _CHUNK
        begin += size - walked
    else:
        walked = tl.minimum(size, _CHUNK)
    for j in range(0, tl.max(walked, 0)):
        acc = add_facts(
            acc,
            begin + j,
            j < walked,
            offs_c,
            mask_c,
            num_columns,
            order_ptr,
            row_ptr,
            end_ptr,
            count_ptr,
            p_ptr,
            table_ptr,
            other_ptr,
        )
    if not CHUNKED:
        acc = _add_long_rows(
            acc,
            begin + _CHUNK,
            size - walked,
            offs_c,
            mask_c,
            num_columns,
            order_ptr,
            row_ptr,
            end_ptr,
            count_ptr,
            p_ptr,
            table_ptr,
            other_ptr,
            BLOCK,
            BLOCK_C,
        )
    return acc


@triton.jit
def chunk_rows(offs_n, mask_n, ptr_ptr):
    """(row of `chunk` for each of a tile of rows v, whether v has whole chunks)."""
    begin = tl.load(ptr_ptr + offs_n, mask=mask_n, other=0)
    size = tl.load(ptr_ptr + offs_n + 1, mask=mask_n, other=0) - begin
    return (begin // _CHUNK).to(tl.int64), size >= _CHUNK


@triton.jit
def add_chunks(acc, offs_n, mask_n, offs_c, mask_c, num_columns, ptr_ptr, chunk_ptr):
    """acc_v += the sum of the chunks that a CHUNKED add_rows leaves out."""
    row, live = chunk_rows(offs_n, mask_n, ptr_ptr)
    # Most tiles have none; a branch also keeps their registers apart from other loads'.
    if tl.max(live.to(tl.int32), 0) > 0:
        at = row[:, None] * num_columns + offs_c[None, :]
        acc += tl.load(chunk_ptr + at, mask=live[:, None] & mask_c[None, :], other=0.0)
    return acc
