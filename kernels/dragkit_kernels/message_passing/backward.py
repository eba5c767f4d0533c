"""Triton backward of message_passing and relation_sum: row dots per node, row sums per pair and
graph.

The matrix products are left to PyTorch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import ResourceLimits, spec
from ..library import empty_gradients
from ..orders import FactIndex, contiguous_index
from ..segments import segment_ptr
from .chunks import chunk_sums
from .product import product
from .tiles import COLUMNS, DTYPES, SELF_TILE, dot_tile, sum_tile
from .walk import Summand, add_rows, block_columns, block_rows, chunk_rows, sum_row


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
    for start in range(0, num_columns, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mask = mask_n[:, None] & (offs_c < num_columns)[None, :]
        at = graph[:, None] * num_columns + offs_c[None, :]
        own = tl.load(self_table_ptr + at, mask=mask, other=0.0).to(tl.float32)
        at = offs_n[:, None] * num_columns + offs_c[None, :]
        acc = own * tl.load(delta_ptr + at, mask=mask, other=0.0).to(tl.float32)
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
    if chunk_out_ptr is not None:
        row, live = chunk_rows(offs_n, mask_n, head_rowptr_ptr)
        dp += tl.load(chunk_out_ptr + row, mask=live, other=0.0)
        row, live = chunk_rows(offs_n, mask_n, tail_rowptr_ptr)
        dp += tl.load(chunk_in_ptr + row, mask=live, other=0.0)
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
    ONE_TABLE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dY^F_r = sum_{e: pair=r} n p[head] d[tail] and dY^I_r = sum_{e: pair=r} m p[tail] d[head].

    A gradient whose pointer is None is left out. With ONE_TABLE d_fwd gets the sum of both. Without
    p its factors are one.
    """
    pid_r = tl.program_id(0).to(tl.int64)
    offs_c, mask_c = block_columns(BLOCK_C, num_columns)
    begin = tl.load(pair_rowptr_ptr + pid_r)
    end = tl.load(pair_rowptr_ptr + pid_r + 1)
    at = pid_r * num_columns + offs_c
    fwd = (pair_perm_ptr, tail_ptr, head_ptr, tail_count_ptr, p_ptr, delta_ptr, None)
    inv = (pair_perm_ptr, head_ptr, tail_ptr, head_count_ptr, p_ptr, delta_ptr, None)
    if d_fwd_ptr is not None:
        total = sum_row(begin, end, offs_c, num_columns, fwd, chunk_fwd_ptr, BLOCK_E, BLOCK_C)
        if ONE_TABLE:
            total += sum_row(begin, end, offs_c, num_columns, inv, chunk_inv_ptr, BLOCK_E, BLOCK_C)
        tl.store(d_fwd_ptr + at, total.to(d_fwd_ptr.dtype.element_ty), mask=mask_c)
    if d_inv_ptr is not None:
        total = sum_row(begin, end, offs_c, num_columns, inv, chunk_inv_ptr, BLOCK_E, BLOCK_C)
        tl.store(d_inv_ptr + at, total.to(d_inv_ptr.dtype.element_ty), mask=mask_c)


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
    index: list[Tensor],
    node_graph: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """Launches what output_mask asks for; see `dragkit::message_passing_bwd`."""
    fact_index, node_graph, p = contiguous_index(index), node_graph.contiguous(), p.contiguous()
    inputs = (h, p, table_fwd, table_inv, self_table, weight, bias)
    out = list(empty_gradients(inputs, output_mask))
    # The gradient keeps its dtype: setting elements to zero rounds nothing.
    delta = torch.ops.aten.threshold_backward(grad, h_out, 0).contiguous()
    if output_mask[0]:
        out[0] = product(delta, weight.t(), _common(delta, weight)).to(h.dtype)
    if out[1].numel() > 0:
        tables = [x.contiguous() for x in (table_fwd, table_inv, self_table)]
        _launch_p(out[1], delta, tables, fact_index, node_graph)
    d_fwd, d_inv = (x if x.numel() > 0 else None for x in out[2:4])
    if d_fwd is not None or d_inv is not None:
        _launch_tables(d_fwd, d_inv, delta, p, fact_index)
    if out[4].numel() > 0:
        _launch_self(out[4], delta, p, node_graph)
    if output_mask[5]:
        out[5] = product(h.t(), delta, _common(h, delta, weight)).to(weight.dtype)
    if output_mask[6]:
        out[6] = delta.sum(0, dtype=torch.float32).to(bias.dtype)
    return tuple(out)


def relation_sum_bwd(grad: Tensor, index: list[Tensor]) -> Tensor:
    """Launches the gradient; see `dragkit::relation_sum_bwd`."""
    fact_index = contiguous_index(index)
    d_table = grad.new_empty(fact_index.num_pairs, grad.shape[1])
    if d_table.numel() > 0:
        _launch_tables(d_table, None, grad.contiguous(), None, fact_index)
    return d_table


def _common(*tensors: Tensor) -> torch.dtype:
    """The dtype that all share, else float32."""
    dtypes = {x.dtype for x in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _launch_p(
    dp: Tensor, delta: Tensor, tables: list[Tensor], o: FactIndex, node_graph: Tensor
) -> None:
    num_nodes, num_columns = delta.shape
    tile = dot_tile(num_columns, delta.dtype)
    outgoing = Summand(o.head_perm, o.fact_pair, o.tail, o.tail_count, None, tables[0], delta)
    incoming = Summand(o.tail_perm, o.fact_pair, o.head, o.head_count, None, tables[1], delta)
    _message_passing_bwd_p_kernel[(triton.cdiv(num_nodes, tile.rows),)](
        *(delta, *tables, o.head, o.tail, o.tail_ptr, o.tail_perm, o.head_ptr, o.head_perm),
        *(o.fact_pair, o.head_count, o.tail_count, node_graph),
        chunk_sums(o.head_ptr, o.head, outgoing),
        chunk_sums(o.tail_ptr, o.tail, incoming),
        dp,
        num_nodes,
        num_columns,
        BLOCK_N=tile.rows,
        BLOCK_C=tile.columns,
        **tile.options,
    )


def _launch_tables(
    d_fwd: Tensor | None, d_inv: Tensor | None, delta: Tensor, p: Tensor | None, o: FactIndex
) -> None:
    """Fills the gradients of the tables. Without p, d_fwd is that of one table for both."""
    num_columns, one_table = delta.shape[1], p is None
    fwd = Summand(o.pair_perm, o.tail, o.head, o.tail_count, p, delta)
    inv = Summand(o.pair_perm, o.head, o.tail, o.head_count, p, delta)
    tile = (dot_tile if one_table else sum_tile)(num_columns, delta.dtype)
    _message_passing_bwd_tables_kernel[tile.grid(o.num_pairs * tile.rows, num_columns)](
        *(delta, p, o.head, o.tail, o.pair_ptr, o.pair_perm, o.head_count, o.tail_count),
        chunk_sums(o.pair_ptr, o.fact_pair, fwd) if d_fwd is not None else None,
        chunk_sums(o.pair_ptr, o.fact_pair, inv) if d_inv is not None or one_table else None,
        d_fwd,
        d_inv,
        num_columns,
        ONE_TABLE=one_table,
        BLOCK_E=tile.rows,
        BLOCK_C=tile.columns,
        **tile.options,
    )


def _launch_self(d_self: Tensor, delta: Tensor, p: Tensor, node_graph: Tensor) -> None:
    num_graphs, num_columns = d_self.shape
    tile, graph_ptr = SELF_TILE, segment_ptr(node_graph, num_graphs)
    summand = Summand(None, None, None, None, p, delta)
    _message_passing_bwd_self_kernel[tile.grid(num_graphs * tile.rows, num_columns)](
        delta,
        p,
        graph_ptr,
        chunk_sums(graph_ptr, node_graph, summand),
        d_self,
        num_columns,
        BLOCK_N=tile.rows,
        BLOCK_C=tile.columns,
        **tile.options,
    )


_LIMITS = ResourceLimits(registers=80, shared_bytes=8192, vector_loads=4)
# One table stands for both in relation_sum, where a fact has no weight but its count.
_ONE_TABLE = {"p_ptr": None, "d_inv_ptr": None}
KERNELS = tuple(
    spec(
        kernel,
        _LIMITS,
        tile=tile,
        dtype=dtype,
        constants={"ONE_TABLE": absent is _ONE_TABLE} if "ONE_TABLE" in kernel.arg_names else None,
        **absent,
        **{name: chunks for name in kernel.arg_names if name.startswith("chunk_")},
    )
    for dtype, kind in DTYPES.items()
    for chunks in (None, "*fp32")
    for kernel, tile, absent in (
        *((_message_passing_bwd_p_kernel, dot_tile(c, kind), {}) for c in COLUMNS),
        *((_message_passing_bwd_tables_kernel, sum_tile(c, kind), {}) for c in COLUMNS),
        *((_message_passing_bwd_tables_kernel, dot_tile(c, kind), _ONE_TABLE) for c in COLUMNS),
        (_message_passing_bwd_self_kernel, SELF_TILE, {}),
    )
)
