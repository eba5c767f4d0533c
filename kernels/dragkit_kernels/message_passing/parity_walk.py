"""Triton helpers of message_passing_parity: two sums at a time over the facts of a row.

A product splits by signs, relu(u i) = relu(u) relu(i) + relu(-u) relu(-i), so every walk carries a
sum for the positive and one for the negative part of u and knows nothing of the instructions i.
Sums run in float32 and in the order's own sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import COLUMNS, WideTile

# Facts of a row that its tile walks one by one; the rest of a longer row is summed side by side.
LONG_ROW = tl.constexpr(64)


def parity_tile(num_columns: int) -> WideTile:
    """The narrowest tile that holds all columns; two sums and eight elements of each a thread."""
    columns = next((size for size in COLUMNS if num_columns <= size), COLUMNS[-1])
    return WideTile(rows=8, columns=columns, num_warps=columns // 32, max_registers=128)


def slots_tile(num_columns: int) -> WideTile:
    """The same with four elements a thread, for the sums beside their gradients."""
    tile = parity_tile(num_columns)
    return tile._replace(num_warps=2 * tile.num_warps)


def widened(*tensors: Tensor) -> list[Tensor]:
    """The tensors in float32, without gaps.

    The kernels know no other dtype: relations and instructions are small beside the sums, which are
    float32 in any case, and a kernel for each dtype would be compiled for little.
    """
    return [x.to(torch.float32).contiguous() for x in tensors]


def seed_argument(seed: Tensor | None, like: Tensor) -> Tensor:
    """The seed; without dropout, when the kernels do not look at it, any place of its dtype."""
    return like.new_empty((), dtype=torch.int64) if seed is None else seed


@triton.jit
def split(value):
    """(relu(value), relu(-value)); NaN gives NaN in both."""
    return tl.where(value < 0, 0.0, value), tl.where(value > 0, 0.0, -value)


@triton.jit
def add_facts(
    plus,
    minus,
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
    """plus_i += n_f p[end_f] relu(u), minus_i += n_f p[end_f] relu(-u) with u = table[row_f], for
    the fact f = order[slot_i] of every live lane i.

    Without p that factor is one. With `other`, rows of four lines, the parts are multiplied by the
    first two lines of other[end_f].
    """
    fact = tl.load(order_ptr + slot, mask=live, other=0)
    row = tl.load(row_ptr + fact, mask=live, other=0).to(tl.int64)
    end = tl.load(end_ptr + fact, mask=live, other=0).to(tl.int64)
    weight = tl.load(count_ptr + fact, mask=live, other=0).to(tl.float32)
    if p_ptr is not None:
        weight *= tl.load(p_ptr + end, mask=live, other=0.0)
    mask = live[:, None] & mask_c[None, :]
    at = row[:, None] * num_columns + offs_c[None, :]
    up, down = split(tl.load(table_ptr + at, mask=mask, other=0.0))
    if other_ptr is not None:
        at = end[:, None] * (4 * num_columns) + offs_c[None, :]
        up *= tl.load(other_ptr + at, mask=mask, other=0.0)
        down *= tl.load(other_ptr + num_columns + at, mask=mask, other=0.0)
    return tl.fma(weight[:, None], up, plus), tl.fma(weight[:, None], down, minus)


@triton.jit
def add_rows(
    plus,
    minus,
    offs_n,
    mask_n,
    offs_c,
    mask_c,
    num_columns,
    begin_ptr,
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
    """Both sums of add_facts over the slots begin[v]..begin[v+1], for a tile of rows v.

    The j-th facts of all rows go together; a row of more than LONG_ROW facts would keep the others
    waiting, so its rest is summed BLOCK facts at a time.
    """
    begin = tl.load(begin_ptr + offs_n, mask=mask_n, other=0)
    size = tl.load(begin_ptr + offs_n + 1, mask=mask_n, other=0) - begin
    longest = tl.max(size, 0)
    for j in range(0, tl.minimum(longest, LONG_ROW)):
        plus, minus = add_facts(
            plus, minus, begin + j, j < size, offs_c, mask_c, num_columns, order_ptr, row_ptr,
            end_ptr, count_ptr, p_ptr, table_ptr, other_ptr,
        )  # fmt: skip
    if longest > LONG_ROW:
        lane = tl.arange(0, BLOCK)
        for i in range(0, BLOCK):
            first = tl.sum(tl.where(lane == i, begin, 0), 0)
            end = first + tl.sum(tl.where(lane == i, size, 0), 0)
            if end - first > LONG_ROW:
                part_plus = tl.zeros((BLOCK, BLOCK_C), tl.float32)
                part_minus = tl.zeros((BLOCK, BLOCK_C), tl.float32)
                for start in range(first + LONG_ROW, end, BLOCK):
                    slot = start + lane
                    part_plus, part_minus = add_facts(
                        part_plus, part_minus, slot, slot < end, offs_c, mask_c, num_columns,
                        order_ptr, row_ptr, end_ptr, count_ptr, p_ptr, table_ptr, other_ptr,
                    )  # fmt: skip
                own = lane[:, None] == i
                plus += tl.where(own, tl.sum(part_plus, 0)[None, :], 0.0)
                minus += tl.where(own, tl.sum(part_minus, 0)[None, :], 0.0)
    return plus, minus


@triton.jit
def sums_of_rows(
    offs_n,
    mask_n,
    offs_c,
    mask_c,
    num_columns,
    begin_ptr,
    order_ptr,
    fact_relation_ptr,
    end_ptr,
    count_ptr,
    p_ptr,
    table_ptr,
    own_ptr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(S+, S-) of a tile of nodes in one direction, self-loops included."""
    p = tl.load(p_ptr + offs_n, mask=mask_n, other=0.0)
    up, down = split(tl.load(own_ptr + offs_c, mask=mask_c, other=0.0))
    return add_rows(
        p[:, None] * up[None, :], p[:, None] * down[None, :], offs_n, mask_n, offs_c, mask_c,
        num_columns, begin_ptr, order_ptr, fact_relation_ptr, end_ptr, count_ptr, p_ptr,
        table_ptr, None, BLOCK, BLOCK_C,
    )  # fmt: skip
