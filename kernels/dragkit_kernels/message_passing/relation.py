"""Triton forward and backward of relation_sum: the walks of message_passing without weights."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import Budget
from .chunks import chunk_sums
from .tiles import COLUMNS, DTYPES, dot_tile, wide_spec
from .walk import add_chunks, add_rows, block_rows, sum_row


@triton.jit(do_not_specialize=["num_nodes"])
def _relation_sum_fwd_kernel(
    table_ptr,
    tail_begin_ptr,
    tail_fact_ptr,
    head_begin_ptr,
    head_fact_ptr,
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
    """out_v = sum_in n Y[pair] + sum_out m Y[pair] for a tile of nodes v and a block of columns."""
    offs_n, mask_n = block_rows(BLOCK_N, num_nodes)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_columns
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    acc = add_rows(
        acc, offs_n, mask_n, offs_c, mask_c, num_columns, tail_begin_ptr, tail_fact_ptr,
        fact_pair_ptr, None, tail_count_ptr, None, table_ptr, None,
        chunk_in_ptr is not None, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    acc = add_rows(
        acc, offs_n, mask_n, offs_c, mask_c, num_columns, head_begin_ptr, head_fact_ptr,
        fact_pair_ptr, None, head_count_ptr, None, table_ptr, None,
        chunk_out_ptr is not None, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    if chunk_in_ptr is not None:
        acc = add_chunks(
            acc, offs_n, mask_n, offs_c, mask_c, num_columns, tail_begin_ptr, chunk_in_ptr
        )
        acc = add_chunks(
            acc, offs_n, mask_n, offs_c, mask_c, num_columns, head_begin_ptr, chunk_out_ptr
        )
    at = offs_n[:, None] * num_columns + offs_c[None, :]
    mask = mask_n[:, None] & mask_c[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _relation_sum_bwd_kernel(
    grad_ptr,
    head_ptr,
    tail_ptr,
    pair_begin_ptr,
    pair_fact_ptr,
    head_count_ptr,
    tail_count_ptr,
    chunk_fwd_ptr,
    chunk_inv_ptr,
    d_table_ptr,
    num_columns,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dY_r = sum_{e: pair=r} n grad[tail] + m grad[head]."""
    pid_r = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_columns
    begin = tl.load(pair_begin_ptr + pid_r)
    end = tl.load(pair_begin_ptr + pid_r + 1)
    total = sum_row(
        begin, end, offs_c, mask_c, num_columns, pair_fact_ptr, tail_ptr, None,
        tail_count_ptr, None, grad_ptr, None, chunk_fwd_ptr, BLOCK_E, BLOCK_C,
    )  # fmt: skip
    total += sum_row(
        begin, end, offs_c, mask_c, num_columns, pair_fact_ptr, head_ptr, None,
        head_count_ptr, None, grad_ptr, None, chunk_inv_ptr, BLOCK_E, BLOCK_C,
    )  # fmt: skip
    at = pid_r * num_columns + offs_c
    tl.store(d_table_ptr + at, total.to(d_table_ptr.dtype.element_ty), mask=mask_c)


def relation_sum_fwd(
    table: Tensor,
    head: Tensor,
    tail: Tensor,
    tail_ptr: Tensor,
    tail_fact: Tensor,
    head_ptr: Tensor,
    head_fact: Tensor,
    pair_ptr: Tensor,
    pair_fact: Tensor,
    fact_pair: Tensor,
    head_count: Tensor,
    tail_count: Tensor,
) -> Tensor:
    """Launches the sum; see `dragkit::relation_sum_fwd`."""
    num_nodes, num_columns = tail_ptr.shape[0] - 1, table.shape[1]
    out = table.new_empty(num_nodes, num_columns)
    if out.numel() == 0:
        return out
    tile = dot_tile(num_columns, table.dtype)
    table = table.contiguous()
    walks = (head, tail, tail_ptr, tail_fact, head_ptr, head_fact, fact_pair, head_count)
    walks = tuple(x.contiguous() for x in (*walks, tail_count))
    head, tail, tail_ptr, tail_fact, head_ptr, head_fact, fact_pair, head_count, tail_count = walks
    _relation_sum_fwd_kernel[tile.grid(num_nodes, num_columns)](
        table,
        *(tail_ptr, tail_fact, head_ptr, head_fact, fact_pair, head_count, tail_count),
        chunk_sums(tail_ptr, tail, tail_fact, fact_pair, None, tail_count, None, table),
        chunk_sums(head_ptr, head, head_fact, fact_pair, None, head_count, None, table),
        out,
        num_nodes,
        num_columns,
        BLOCK_N=tile.rows,
        BLOCK_C=tile.columns,
        **tile.options,
    )
    return out


def relation_sum_bwd(
    grad: Tensor,
    head: Tensor,
    tail: Tensor,
    pair_ptr: Tensor,
    pair_fact: Tensor,
    fact_pair: Tensor,
    head_count: Tensor,
    tail_count: Tensor,
) -> Tensor:
    """Launches the gradient; see `dragkit::relation_sum_bwd`."""
    num_pairs, num_columns = pair_ptr.shape[0] - 1, grad.shape[1]
    d_table = grad.new_empty(num_pairs, num_columns)
    if d_table.numel() == 0:
        return d_table
    tile = dot_tile(num_columns, grad.dtype)
    grad = grad.contiguous()
    orders = (head, tail, pair_ptr, pair_fact, fact_pair, head_count, tail_count)
    orders = tuple(x.contiguous() for x in orders)
    head, tail, pair_ptr, pair_fact, fact_pair, head_count, tail_count = orders
    walk = (pair_ptr, fact_pair, pair_fact)
    _relation_sum_bwd_kernel[tile.grid(num_pairs * tile.rows, num_columns)](
        grad,
        *(head, tail, pair_ptr, pair_fact, head_count, tail_count),
        chunk_sums(*walk, tail, None, tail_count, None, grad),
        chunk_sums(*walk, head, None, head_count, None, grad),
        d_table,
        num_columns,
        BLOCK_E=tile.rows,
        BLOCK_C=tile.columns,
        **tile.options,
    )
    return d_table


BUDGET = Budget(registers=80, shared=8192, wide_loads=4)
KERNELS = tuple(
    wide_spec(kernel, kind, dot_tile(columns, dtype), rows, BUDGET, chunks=chunks)
    for columns in COLUMNS
    for kind, dtype in DTYPES.items()
    for chunks in (None, "*fp32")
    for kernel, rows in (
        (_relation_sum_fwd_kernel, "BLOCK_N"),
        (_relation_sum_bwd_kernel, "BLOCK_E"),
    )
)
