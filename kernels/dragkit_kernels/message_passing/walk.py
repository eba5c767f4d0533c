"""Triton helpers: weighted sums of table rows over the facts of a row of a FactOrders order.

Every sum runs in float32 and in the order's own sequence, so results do not depend on scheduling.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Facts of a row that its tile walks one by one; the rest of a longer row is summed side by side.
LONG_ROW = tl.constexpr(64)


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
def sum_long_row(
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
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """acc_v += sum of add_facts over the slots ptr[v]..ptr[v+1], for a tile of rows v.

    The j-th facts of all rows go together; a row of more than LONG_ROW facts would keep the others
    waiting, so its rest is summed BLOCK / 2 facts at a time: beside the tile there
    are registers for half of one more.
    """
    begin = tl.load(ptr_ptr + offs_n, mask=mask_n, other=0)
    size = tl.load(ptr_ptr + offs_n + 1, mask=mask_n, other=0) - begin
    longest = tl.max(size, 0)
    for j in range(0, tl.minimum(longest, LONG_ROW)):
        acc = add_facts(
            acc,
            begin + j,
            j < size,
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
    if longest > LONG_ROW:
        lane = tl.arange(0, BLOCK)
        for i in range(0, BLOCK):
            first = tl.sum(tl.where(lane == i, begin, 0), 0)
            facts = tl.sum(tl.where(lane == i, size, 0), 0)
            if facts > LONG_ROW:
                rest = sum_long_row(
                    first + LONG_ROW,
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
