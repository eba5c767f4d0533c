"""Triton helper: the facts of a tile of nodes summed by a product on the tensor cores.

The facts of neighbouring nodes lie side by side in an order by node. A block of them is added by
one product: a matrix that has a fact's weight at its node, and zeros, times the facts' rows. Work
follows the number of facts, however they are spread over the nodes of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..backend import INTERPRETED

# The interpreter computes a product of bfloat16 wrongly.
_WIDEN = tl.constexpr(INTERPRETED)


@triton.jit
def add_one_hot(
    acc,
    offs_c,
    mask_c,
    num_nodes,
    num_columns,
    ptr_ptr,
    key_ptr,
    order_ptr,
    row_ptr,
    end_ptr,
    count_ptr,
    p_ptr,
    table_ptr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """acc_v += sum of n_f p[end_f] table[row_f] over the facts f with key_f = v, as `add_rows`.

    Weights are rounded to the dtype of the table. Zeros of the matrix do not stop NaN and infinity
    in a table: such a number reaches its column of the whole tile.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    end = tl.load(ptr_ptr + tl.minimum(first + BLOCK_N, num_nodes))
    lane = tl.arange(0, BLOCK_N)
    for start in range(tl.load(ptr_ptr + first), end, BLOCK_E):
        slot = start + tl.arange(0, BLOCK_E)
        live = slot < end
        fact = tl.load(order_ptr + slot, mask=live, other=0)
        node = (tl.load(key_ptr + fact, mask=live, other=0) - first).to(tl.int32)
        sender = tl.load(end_ptr + fact, mask=live, other=0)
        weight = tl.load(count_ptr + fact, mask=live, other=0).to(tl.float32)
        weight *= tl.load(p_ptr + sender, mask=live, other=0.0).to(tl.float32)
        own = node[None, :] == lane[:, None]
        row = tl.load(row_ptr + fact, mask=live, other=0).to(tl.int64)
        at = row[:, None] * num_columns + offs_c[None, :]
        value = tl.load(table_ptr + at, mask=live[:, None] & mask_c[None, :], other=0.0)
        hot = tl.where(own, weight[None, :], 0.0).to(value.dtype)
        if _WIDEN:
            hot, value = hot.to(tl.float32), value.to(tl.float32)
        acc = tl.dot(hot, value, acc, input_precision="ieee")
    return acc
