"""Triton backward of message_passing: row dots per node, row sums per pair and per graph.

The matrix products are left to the library.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Budget
from ..segments import segment_ptr
from .chunks import chunk_sums
from .product import product
from .tiles import COLUMNS, DTYPES, SELF_TILE, dot_tile, sum_tile, wide_spec
from .walk import add_rows, block_rows, chunk_rows, sum_row


@triton.jit(do_not_specialize=["num_nodes"])
def _message_passing_bwd_p_kernel(
    delta_ptr,
    table_fwd_ptr,
    table_inv_ptr,
    self_table_ptr,
    head_ptr,
    tail_ptr,
    tail_begin_ptr,
    tail_fact_ptr,
    head_begin_ptr,
    head_fact_ptr,
    fact_pair_ptr,
    head_count_ptr,
    tail_count_ptr,
    node_graph_ptr,
    chunk_out_ptr,
    chunk_in_ptr,
    dp_ptr,
    num_nodes,
    num_columns,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dp_v = sum_{e: head=v} n <Y^F[pair], d[tail]> + sum_{e: tail=v} m <Y^I[pair], d[head]>
    + <Y^self[graph_v], d_v> for a tile of nodes v."""
    offs_n, mask_n = block_rows(BLOCK_N, num_nodes)
    graph = tl.load(node_graph_ptr + offs_n, mask=mask_n, other=0).to(tl.int64)
    dp = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, num_columns, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mask_c = offs_c < num_columns
        mask = mask_n[:, None] & mask_c[None, :]
        own_at = graph[:, None] * num_columns + offs_c[None, :]
        own = tl.load(self_table_ptr + own_at, mask=mask, other=0.0).to(tl.float32)
        at = offs_n[:, None] * num_columns + offs_c[None, :]
        acc = own * tl.load(delta_ptr + at, mask=mask, other=0.0).to(tl.float32)
        acc = add_rows(
            acc, offs_n, mask_n, offs_c, mask_c, num_columns, head_begin_ptr, head_fact_ptr,
            fact_pair_ptr, tail_ptr, tail_count_ptr, None, table_fwd_ptr, delta_ptr,
            chunk_out_ptr is not None, BLOCK_N, BLOCK_C,
        )  # fmt: skip
        acc = add_rows(
            acc, offs_n, mask_n, offs_c, mask_c, num_columns, tail_begin_ptr, tail_fact_ptr,
            fact_pair_ptr, head_ptr, head_count_ptr, None, table_inv_ptr, delta_ptr,
            chunk_in_ptr is not None, BLOCK_N, BLOCK_C,
        )  # fmt: skip
        dp += tl.sum(acc, 1)
    if chunk_out_ptr is not None:
        row, live = chunk_rows(offs_n, mask_n, head_begin_ptr)
        dp += tl.load(chunk_out_ptr + row, mask=live, other=0.0)
        row, live = chunk_rows(offs_n, mask_n, tail_begin_ptr)
        dp += tl.load(chunk_in_ptr + row, mask=live, other=0.0)
    tl.store(dp_ptr + offs_n, dp.to(dp_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def _message_passing_bwd_tables_kernel(
    delta_ptr,
    p_ptr,
    head_ptr,
    tail_ptr,
    pair_begin_ptr,
    pair_fact_ptr,
    head_count_ptr,
    tail_count_ptr,
    chunk_fwd_ptr,
    chunk_inv_ptr,
    d_fwd_ptr,
    d_inv_ptr,
    num_columns,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dY^F_r = sum_{e: pair=r} n p[head] d[tail] and dY^I_r = sum_{e: pair=r} m p[tail] d[head],
    those of the two that have a place to go."""
    pid_r = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_columns
    begin = tl.load(pair_begin_ptr + pid_r)
    end = tl.load(pair_begin_ptr + pid_r + 1)
    at = pid_r * num_columns + offs_c
    if d_fwd_ptr is not None:
        total = sum_row(
            begin, end, offs_c, mask_c, num_columns, pair_fact_ptr, tail_ptr, head_ptr,
            tail_count_ptr, p_ptr, delta_ptr, None, chunk_fwd_ptr, BLOCK_E, BLOCK_C,
        )  # fmt: skip
        tl.store(d_fwd_ptr + at, total.to(d_fwd_ptr.dtype.element_ty), mask=mask_c)
    if d_inv_ptr is not None:
        total = sum_row(
            begin, end, offs_c, mask_c, num_columns, pair_fact_ptr, head_ptr, tail_ptr,
            head_count_ptr, p_ptr, delta_ptr, None, chunk_inv_ptr, BLOCK_E, BLOCK_C,
        )  # fmt: skip
        tl.store(d_inv_ptr + at, total.to(d_inv_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def _message_passing_bwd_self_kernel(
    delta_ptr,
    p_ptr,
    graph_begin_ptr,
    chunk_ptr,
    d_self_ptr,
    num_columns,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dY^self_g = sum of p_v d_v over the nodes v of graph g."""
    pid_g = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_columns
    total = sum_row(
        tl.load(graph_begin_ptr + pid_g), tl.load(graph_begin_ptr + pid_g + 1), offs_c, mask_c,
        num_columns, None, None, None, None, p_ptr, delta_ptr, None, chunk_ptr, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    at = pid_g * num_columns + offs_c
    tl.store(d_self_ptr + at, total.to(d_self_ptr.dtype.element_ty), mask=mask_c)


def message_passing_bwd(
    grad: Tensor,
    h_out: Tensor,
    h: Tensor,
    p: Tensor,
    table_fwd: Tensor,
    table_inv: Tensor,
    self_table: Tensor,
    weight: Tensor,
    bias: Tensor,
    *rest: Tensor | list[bool],
) -> tuple[Tensor, ...]:
    """Launches what output_mask asks for; see `dragkit::message_passing_bwd`."""
    *orders, node_graph, output_mask = rest
    orders = [x.contiguous() for x in orders]
    inputs = (h, p, table_fwd, table_inv, self_table, weight, bias)
    out = [
        x.new_empty(x.shape if wanted else (0,))
        for x, wanted in zip(inputs, output_mask, strict=True)
    ]
    # The gradient keeps its dtype: setting elements to zero rounds nothing.
    delta = torch.ops.aten.threshold_backward(grad, h_out, 0).contiguous()
    p = p.contiguous()
    if output_mask[0]:
        out[0] = product(delta, weight.t(), _common(delta, weight)).to(h.dtype)
    if out[1].numel() > 0:
        tables = [x.contiguous() for x in (table_fwd, table_inv, self_table)]
        _launch_p(out[1], delta, tables, orders, node_graph.contiguous())
    if out[2].numel() + out[3].numel() > 0:
        _launch_tables(out[2:4], delta, p, orders)
    if out[4].numel() > 0:
        _launch_self(out[4], delta, p, node_graph.contiguous())
    if output_mask[5]:
        out[5] = product(h.t(), delta, _common(h, delta, weight)).to(weight.dtype)
    if output_mask[6]:
        out[6] = delta.sum(0, dtype=torch.float32).to(bias.dtype)
    return tuple(out)


def _common(*tensors: Tensor) -> torch.dtype:
    """The dtype that all share, else float32."""
    dtypes = {x.dtype for x in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _launch_p(
    dp: Tensor, delta: Tensor, tables: list[Tensor], orders: list[Tensor], node_graph: Tensor
) -> None:
    head, tail, tail_ptr, tail_fact, head_ptr, head_fact, _, _, *rest = orders
    fact_pair, head_count, tail_count = rest
    table_fwd, table_inv, _ = tables
    num_nodes, num_columns = delta.shape
    tile = dot_tile(num_columns, delta.dtype)
    _message_passing_bwd_p_kernel[(triton.cdiv(num_nodes, tile.rows),)](
        delta,
        *tables,
        *(head, tail, tail_ptr, tail_fact, head_ptr, head_fact),
        *rest,
        node_graph,
        chunk_sums(head_ptr, head, head_fact, fact_pair, tail, tail_count, None, table_fwd, delta),
        chunk_sums(tail_ptr, tail, tail_fact, fact_pair, head, head_count, None, table_inv, delta),
        dp,
        num_nodes,
        num_columns,
        BLOCK_N=tile.rows,
        BLOCK_C=tile.columns,
        **tile.options,
    )


def _launch_tables(d_tables: list[Tensor], delta: Tensor, p: Tensor, orders: list[Tensor]) -> None:
    head, tail, _, _, _, _, pair_ptr, pair_fact, fact_pair, head_count, tail_count = orders
    num_pairs, num_columns = pair_ptr.shape[0] - 1, delta.shape[1]
    tile = sum_tile(num_columns, delta.dtype)
    walk = (pair_ptr, fact_pair, pair_fact)
    sides = ((tail, head, tail_count), (head, tail, head_count))
    chunks = [
        chunk_sums(*walk, *side, p, delta) if out.numel() > 0 else None
        for out, side in zip(d_tables, sides, strict=True)
    ]
    _message_passing_bwd_tables_kernel[tile.grid(num_pairs * tile.rows, num_columns)](
        delta,
        p,
        *(head, tail, pair_ptr, pair_fact, head_count, tail_count),
        *chunks,
        *(x if x.numel() > 0 else None for x in d_tables),
        num_columns,
        BLOCK_E=tile.rows,
        BLOCK_C=tile.columns,
        **tile.options,
    )


def _launch_self(d_self: Tensor, delta: Tensor, p: Tensor, node_graph: Tensor) -> None:
    num_graphs, num_columns = d_self.shape
    tile = SELF_TILE
    graph_ptr = segment_ptr(node_graph, num_graphs)
    _message_passing_bwd_self_kernel[tile.grid(num_graphs * tile.rows, num_columns)](
        delta,
        p,
        graph_ptr,
        chunk_sums(graph_ptr, node_graph, None, None, None, None, p, delta),
        d_self,
        num_columns,
        BLOCK_N=tile.rows,
        BLOCK_C=tile.columns,
        **tile.options,
    )


BUDGET = Budget(registers=80, shared=8192, wide_loads=4)
KERNELS = tuple(
    wide_spec(kernel, kind, tile, rows, BUDGET, chunks=chunks)
    for kind, dtype in DTYPES.items()
    for chunks in (None, "*fp32")
    for kernel, tile, rows in (
        *((_message_passing_bwd_p_kernel, dot_tile(c, dtype), "BLOCK_N") for c in COLUMNS),
        *((_message_passing_bwd_tables_kernel, sum_tile(c, dtype), "BLOCK_E") for c in COLUMNS),
        (_message_passing_bwd_self_kernel, SELF_TILE, "BLOCK_N"),
    )
)
