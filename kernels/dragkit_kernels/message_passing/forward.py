"""Triton forward of message_passing: the whole layer in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import INTERPRETED
from ..chunk_sums import chunk_sums
from ..launch import ResourceLimits, spec
from ..orders import contiguous_index
from ..row_sums import (
    COLUMNS,
    DTYPES,
    Summand,
    add_chunks,
    add_rows,
    block_columns,
    block_rows,
    layer_tile,
)
from .torch_impl import matmul

# The kernel multiplies h by the weight for these dtypes, and PyTorch does for the others. The
# interpreter computes bfloat16 products wrongly.
TENSOR_CORE_DTYPES = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)
# Rows of the weight in one step of the product.
DEPTH = 32


# Not specialised on num_nodes: Triton would recompile the kernel for packs of 16 n nodes.
@triton.jit(do_not_specialize=["num_nodes"])
def _message_passing_fwd_kernel(
    h_ptr,
    weight_ptr,
    bias_ptr,
    p_ptr,
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
    chunk_in_ptr,
    chunk_out_ptr,
    out_ptr,
    num_nodes,
    num_columns,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out_v = relu(h_v W + b + sum_in n p[head] Y^F[pair] + sum_out m p[tail] Y^I[pair]
    + p_v Y^self[graph_v]) for a tile of nodes v and a block of columns.

    With `weight` the tensor cores compute h W here. Without it, `h` holds h W in float32.
    """
    offs_n, mask_n = block_rows(BLOCK_N, num_nodes)
    offs_c, mask_c = block_columns(BLOCK_C, num_columns)
    row = offs_n[:, None] * num_columns
    mask = mask_n[:, None] & mask_c[None, :]

    # The product comes first, because tl.dot accumulates into `acc`.
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    if weight_ptr is not None:
        for start in range(0, num_columns, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            mask_k = offs_k < num_columns
            h_mask = mask_n[:, None] & mask_k[None, :]
            h = tl.load(h_ptr + row + offs_k[None, :], mask=h_mask, other=0.0)
            offs = offs_k[:, None].to(tl.int64) * num_columns + offs_c[None, :]
            w_mask = mask_k[:, None] & mask_c[None, :]
            w = tl.load(weight_ptr + offs, mask=w_mask, other=0.0)
            acc = tl.dot(h, w, acc)

    summand = (tail_perm_ptr, fact_pair_ptr, head_ptr, tail_count_ptr, p_ptr, table_fwd_ptr, None)
    acc = add_rows(
        acc, offs_n, mask_n, offs_c, num_columns, tail_rowptr_ptr, summand,
        chunk_in_ptr is not None, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    summand = (head_perm_ptr, fact_pair_ptr, tail_ptr, head_count_ptr, p_ptr, table_inv_ptr, None)
    acc = add_rows(
        acc, offs_n, mask_n, offs_c, num_columns, head_rowptr_ptr, summand,
        chunk_out_ptr is not None, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    # Other programs summed the whole chunks of long rows.
    if chunk_in_ptr is not None:
        acc = add_chunks(acc, offs_n, mask_n, offs_c, num_columns, tail_rowptr_ptr, chunk_in_ptr)
        acc = add_chunks(acc, offs_n, mask_n, offs_c, num_columns, head_rowptr_ptr, chunk_out_ptr)

    graph = tl.load(node_graph_ptr + offs_n, mask=mask_n, other=0).to(tl.int64)
    offs = graph[:, None] * num_columns + offs_c[None, :]
    self_row = tl.load(self_table_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(p_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    acc = tl.fma(p[:, None], self_row, acc)
    acc += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    if weight_ptr is None:
        acc += tl.load(h_ptr + row + offs_c[None, :], mask=mask, other=0.0)
    # A comparison with NaN is false, so NaN stays NaN as in torch.relu.
    acc = tl.where(acc < 0.0, 0.0, acc)
    tl.store(out_ptr + row + offs_c[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def message_passing_fwd(
    h: Tensor,
    p: Tensor,
    table_fwd: Tensor,
    table_inv: Tensor,
    self_table: Tensor,
    weight: Tensor,
    bias: Tensor,
    index: list[Tensor],
    node_graph: Tensor,
) -> Tensor:
    """Launches the layer (see `dragkit::message_passing_fwd`)."""
    out = h.new_empty(h.shape)
    if out.numel() == 0:
        return out
    num_nodes, num_columns = out.shape
    facts, p = contiguous_index(index), p.contiguous()
    table_fwd, table_inv = table_fwd.contiguous(), table_inv.contiguous()
    if h.dtype == weight.dtype and h.dtype in TENSOR_CORE_DTYPES:
        # A strided weight is copied: the copy is small, and programs read it row by row.
        h, kernel_weight = h.contiguous(), weight.contiguous()
    else:
        h, kernel_weight = matmul(h, weight, torch.float32), None
    incoming = Summand(facts.tail_perm, facts.fact_pair, facts.head, facts.tail_count, p, table_fwd)
    outgoing = Summand(facts.head_perm, facts.fact_pair, facts.tail, facts.head_count, p, table_inv)
    tile = layer_tile(num_columns, table_fwd.dtype)
    _message_passing_fwd_kernel[tile.grid(num_nodes, num_columns)](
        *(h, kernel_weight, bias.contiguous(), p, table_fwd, table_inv, self_table.contiguous()),
        *(facts.head, facts.tail, facts.tail_ptr, facts.tail_perm, facts.head_ptr),
        *(facts.head_perm, facts.fact_pair, facts.head_count, facts.tail_count),
        node_graph.contiguous(),
        chunk_sums(facts.tail_ptr, facts.tail, incoming),
        chunk_sums(facts.head_ptr, facts.head, outgoing),
        *(out, num_nodes, num_columns),
        BLOCK_K=DEPTH,
        BLOCK_N=tile.rows,
        BLOCK_C=tile.columns,
        **tile.options,
    )
    return out


# Types of arguments where PyTorch computes the product.
_SEPARATE = {"h_ptr": "*fp32", "weight_ptr": None}
KERNELS = tuple(
    spec(
        _message_passing_fwd_kernel,
        ResourceLimits(128, shared_bytes=40960, vector_loads=8, mma_instructions=mma),
        tile=layer_tile(columns, DTYPES[dtype]),
        dtype=dtype,
        constants={"BLOCK_K": DEPTH},
        chunk_in_ptr=chunks,
        chunk_out_ptr=chunks,
        **types,
    )
    for columns in COLUMNS
    for chunks in (None, "*fp32")
    for dtype, types, mma in (
        ("*bf16", {}, 16),
        ("*bf16", _SEPARATE, 0),
        ("*fp32", _SEPARATE, 0),
    )
)
