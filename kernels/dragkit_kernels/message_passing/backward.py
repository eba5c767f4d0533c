"""Triton backward of message_passing: row dots per node, and row sums per pair and per graph.

PyTorch computes the matrix products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..chunk_sums import chunk_sums
from ..launch import ResourceLimits, Tile2D, spec
from ..library import empty_gradients
from ..orders import FactIndex, contiguous_index
from ..row_sums import (
    COLUMNS,
    DTYPES,
    Summand,
    add_rows,
    block_columns,
    block_rows,
    chunk_rows,
    dot_tile,
    sum_row,
    sum_tile,
)
from ..segments import segment_ptr
from .torch_impl import matmul

# A pack has few graphs of many nodes, so the tile is tall and narrow.
SELF_TILE = Tile2D(rows=128, columns=64, num_warps=8)


@triton.jit(do_not_specialize=["num_nodes"])
def _message_passing_bwd_p_kernel(
    delta_ptr,
    table_fwd_ptr,
    table_inv_ptr,
    self_table_ptr,
    head_ptr,
    tail_ptr,
    tail_rowptr_ptr,
    tail_perm_ptr,
    head_rowptr_ptr,
    head_perm_ptr,
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
    # A dot needs every column of a node, so columns are a loop and not a program axis.
    for start in range(0, num_columns, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mask = mask_n[:, None] & (offs_c < num_columns)[None, :]
        offs = graph[:, None] * num_columns + offs_c[None, :]
        self_row = tl.load(self_table_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        offs = offs_n[:, None] * num_columns + offs_c[None, :]
        acc = self_row * tl.load(delta_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        summand = (
            head_perm_ptr, fact_pair_ptr, tail_ptr, tail_count_ptr, None, table_fwd_ptr, delta_ptr,
        )  # fmt: skip
        acc = add_rows(
            acc, offs_n, mask_n, offs_c, num_columns, head_rowptr_ptr, summand,
            chunk_out_ptr is not None, BLOCK_N, BLOCK_C,
        )  # fmt: skip
        summand = (
            tail_perm_ptr, fact_pair_ptr, head_ptr, head_count_ptr, None, table_inv_ptr, delta_ptr,
        )  # fmt: skip
        acc = add_rows(
            acc, offs_n, mask_n, offs_c, num_columns, tail_rowptr_ptr, summand,
            chunk_in_ptr is not None, BLOCK_N, BLOCK_C,
        )  # fmt: skip
        dp += tl.sum(acc, 1)
    # The sums of chunks are complete dots, one number for each: they are added once.
    if chunk_out_ptr is not None:
        row, has_chunks = chunk_rows(offs_n, mask_n, head_rowptr_ptr)
        dp += tl.load(chunk_out_ptr + row, mask=has_chunks, other=0.0)
        row, has_chunks = chunk_rows(offs_n, mask_n, tail_rowptr_ptr)
        dp += tl.load(chunk_in_ptr + row, mask=has_chunks, other=0.0)
    tl.store(dp_ptr + offs_n, dp.to(dp_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def _message_passing_bwd_tables_kernel(
    delta_ptr,
    p_ptr,
    head_ptr,
    tail_ptr,
    pair_rowptr_ptr,
    pair_perm_ptr,
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
    """dY^F_r = sum_{e: pair=r} n p[head] d[tail] and dY^I_r = sum_{e: pair=r} m p[tail] d[head].

    A gradient whose pointer is None is not computed.
    """
    pid_r = tl.program_id(0).to(tl.int64)
    offs_c, mask_c = block_columns(BLOCK_C, num_columns)
    begin = tl.load(pair_rowptr_ptr + pid_r)
    end = tl.load(pair_rowptr_ptr + pid_r + 1)
    offs = pid_r * num_columns + offs_c
    if d_fwd_ptr is not None:
        summand = (pair_perm_ptr, tail_ptr, head_ptr, tail_count_ptr, p_ptr, delta_ptr, None)
        total = sum_row(begin, end, offs_c, num_columns, summand, chunk_fwd_ptr, BLOCK_E, BLOCK_C)
        tl.store(d_fwd_ptr + offs, total.to(d_fwd_ptr.dtype.element_ty), mask=mask_c)
    if d_inv_ptr is not None:
        summand = (pair_perm_ptr, head_ptr, tail_ptr, head_count_ptr, p_ptr, delta_ptr, None)
        total = sum_row(begin, end, offs_c, num_columns, summand, chunk_inv_ptr, BLOCK_E, BLOCK_C)
        tl.store(d_inv_ptr + offs, total.to(d_inv_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def _message_passing_bwd_self_kernel(
    delta_ptr,
    p_ptr,
    graph_rowptr_ptr,
    chunk_ptr,
    d_self_ptr,
    num_columns,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dY^self_g = sum of p_v d_v over the nodes v of graph g."""
    pid_g = tl.program_id(0).to(tl.int64)
    offs_c, mask_c = block_columns(BLOCK_C, num_columns)
    begin = tl.load(graph_rowptr_ptr + pid_g)
    end = tl.load(graph_rowptr_ptr + pid_g + 1)
    summand = (None, None, None, None, p_ptr, delta_ptr, None)
    total = sum_row(begin, end, offs_c, num_columns, summand, chunk_ptr, BLOCK_N, BLOCK_C)
    offs = pid_g * num_columns + offs_c
    tl.store(d_self_ptr + offs, total.to(d_self_ptr.dtype.element_ty), mask=mask_c)


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
    index: list[Tensor],
    node_graph: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """Launches what `output_mask` asks for (see `dragkit::message_passing_bwd`)."""
    facts, node_graph, p = contiguous_index(index), node_graph.contiguous(), p.contiguous()
    inputs = (h, p, table_fwd, table_inv, self_table, weight, bias)
    out = list(empty_gradients(inputs, output_mask))
    # The gradient of the relu's input. It keeps its dtype: setting elements to zero rounds nothing.
    delta = torch.ops.aten.threshold_backward(grad, h_out, 0).contiguous()
    if output_mask[0]:
        out[0] = matmul(delta, weight.t(), _common_dtype(delta, weight)).to(h.dtype)
    if out[1].numel() > 0:
        tables = [x.contiguous() for x in (table_fwd, table_inv, self_table)]
        _launch_p(out[1], delta, tables, facts, node_graph)
    d_fwd, d_inv = (x if x.numel() > 0 else None for x in out[2:4])
    if d_fwd is not None or d_inv is not None:
        _launch_tables(d_fwd, d_inv, delta, p, facts)
    if out[4].numel() > 0:
        _launch_self(out[4], delta, p, node_graph)
    if output_mask[5]:
        out[5] = matmul(h.t(), delta, _common_dtype(h, delta, weight)).to(weight.dtype)
    if output_mask[6]:
        out[6] = delta.sum(0, dtype=torch.float32).to(bias.dtype)
    return tuple(out)


def _common_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that all tensors share, else float32."""
    dtypes = {x.dtype for x in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _launch_p(
    dp: Tensor, delta: Tensor, tables: list[Tensor], facts: FactIndex, node_graph: Tensor
) -> None:
    num_nodes, num_columns = delta.shape
    tile = dot_tile(num_columns, delta.dtype)
    outgoing = Summand(
        facts.head_perm, facts.fact_pair, facts.tail, facts.tail_count, None, tables[0], delta
    )
    incoming = Summand(
        facts.tail_perm, facts.fact_pair, facts.head, facts.head_count, None, tables[1], delta
    )
    _message_passing_bwd_p_kernel[(triton.cdiv(num_nodes, tile.rows),)](
        *(delta, *tables, facts.head, facts.tail, facts.tail_ptr, facts.tail_perm),
        *(facts.head_ptr, facts.head_perm, facts.fact_pair, facts.head_count, facts.tail_count),
        node_graph,
        chunk_sums(facts.head_ptr, facts.head, outgoing),
        chunk_sums(facts.tail_ptr, facts.tail, incoming),
        *(dp, num_nodes, num_columns),
        BLOCK_N=tile.rows,
        BLOCK_C=tile.columns,
        **tile.options,
    )


def _launch_tables(
    d_fwd: Tensor | None, d_inv: Tensor | None, delta: Tensor, p: Tensor, facts: FactIndex
) -> None:
    num_columns = delta.shape[1]
    fwd = Summand(facts.pair_perm, facts.tail, facts.head, facts.tail_count, p, delta)
    inv = Summand(facts.pair_perm, facts.head, facts.tail, facts.head_count, p, delta)
    # One program per pair: the rows of the tile are facts of the pair.
    tile = sum_tile(num_columns, delta.dtype)
    _message_passing_bwd_tables_kernel[tile.grid(facts.num_pairs * tile.rows, num_columns)](
        *(delta, p, facts.head, facts.tail, facts.pair_ptr, facts.pair_perm),
        *(facts.head_count, facts.tail_count),
        None if d_fwd is None else chunk_sums(facts.pair_ptr, facts.fact_pair, fwd),
        None if d_inv is None else chunk_sums(facts.pair_ptr, facts.fact_pair, inv),
        *(d_fwd, d_inv, num_columns),
        BLOCK_E=tile.rows,
        BLOCK_C=tile.columns,
        **tile.options,
    )


def _launch_self(d_self: Tensor, delta: Tensor, p: Tensor, node_graph: Tensor) -> None:
    num_graphs, num_columns = d_self.shape
    # One program per graph: the rows of the tile are nodes of the graph.
    tile, graph_ptr = SELF_TILE, segment_ptr(node_graph, num_graphs)
    chunks = chunk_sums(graph_ptr, node_graph, Summand(None, None, None, None, p, delta))
    _message_passing_bwd_self_kernel[tile.grid(num_graphs * tile.rows, num_columns)](
        *(delta, p, graph_ptr, chunks, d_self, num_columns),
        BLOCK_N=tile.rows,
        BLOCK_C=tile.columns,
        **tile.options,
    )


KERNELS = tuple(
    spec(
        kernel,
        ResourceLimits(registers=80, shared_bytes=8192, vector_loads=4),
        tile=tile,
        dtype=dtype,
        **{name: chunks for name in kernel.arg_names if name.startswith("chunk_")},
    )
    for dtype, torch_dtype in DTYPES.items()
    for chunks in (None, "*fp32")
    for kernel, tile in (
        *((_message_passing_bwd_p_kernel, dot_tile(c, torch_dtype)) for c in COLUMNS),
        *((_message_passing_bwd_tables_kernel, sum_tile(c, torch_dtype)) for c in COLUMNS),
        (_message_passing_bwd_self_kernel, SELF_TILE),
    )
)
