"""Triton forward of message_passing: the whole layer in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import INTERPRETED
from ..launch import Budget
from .chunks import chunk_sums
from .product import product
from .tiles import COLUMNS, DTYPES, layer_tile, wide_spec
from .walk import add_chunks, add_rows, block_rows

# Others are multiplied by the library; the interpreter computes bfloat16 wrongly.
TENSOR_CORE_DTYPES = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)
# Rows of the weight that a program takes at a time.
DEPTH = 32


@triton.jit(do_not_specialize=["num_nodes"])
def _message_passing_fwd_kernel(
    h_ptr,
    p_ptr,
    table_fwd_ptr,
    table_inv_ptr,
    self_table_ptr,
    weight_ptr,
    bias_ptr,
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
    product_ptr,
    chunk_in_ptr,
    chunk_out_ptr,
    out_ptr,
    num_nodes,
    num_columns,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out_v = relu(h_v W + b + sum_in n p[head] Y^F[pair] + sum_out m p[tail] Y^I[pair]
    + p_v Y^self[graph_v]) for a tile of nodes v and a block of columns.

    The product h W is read from `product` or, where that is None, made here on the tensor cores.
    """
    offs_n, mask_n = block_rows(BLOCK_N, num_nodes)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_columns
    row = offs_n[:, None] * num_columns

    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    if product_ptr is None:
        for start in range(0, num_columns, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            mask_k = offs_k < num_columns
            h_mask = mask_n[:, None] & mask_k[None, :]
            h = tl.load(h_ptr + row + offs_k[None, :], mask=h_mask, other=0.0)
            at = offs_k[:, None].to(tl.int64) * num_columns + offs_c[None, :]
            w_mask = mask_k[:, None] & mask_c[None, :]
            w = tl.load(weight_ptr + at, mask=w_mask, other=0.0)
            acc = tl.dot(h, w, acc)

    acc = add_rows(
        acc, offs_n, mask_n, offs_c, mask_c, num_columns, tail_begin_ptr, tail_fact_ptr,
        fact_pair_ptr, head_ptr, tail_count_ptr, p_ptr, table_fwd_ptr, None,
        chunk_in_ptr is not None, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    acc = add_rows(
        acc, offs_n, mask_n, offs_c, mask_c, num_columns, head_begin_ptr, head_fact_ptr,
        fact_pair_ptr, tail_ptr, head_count_ptr, p_ptr, table_inv_ptr, None,
        chunk_out_ptr is not None, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    if chunk_in_ptr is not None:
        acc = add_chunks(
            acc, offs_n, mask_n, offs_c, mask_c, num_columns, tail_begin_ptr, chunk_in_ptr
        )
        acc = add_chunks(
            acc, offs_n, mask_n, offs_c, mask_c, num_columns, head_begin_ptr, chunk_out_ptr
        )

    mask = mask_n[:, None] & mask_c[None, :]
    graph = tl.load(node_graph_ptr + offs_n, mask=mask_n, other=0).to(tl.int64)
    at = graph[:, None] * num_columns + offs_c[None, :]
    own = tl.load(self_table_ptr + at, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(p_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    acc = tl.fma(p[:, None], own, acc)
    acc += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    if product_ptr is not None:
        acc += tl.load(product_ptr + row + offs_c[None, :], mask=mask, other=0.0)
    # A comparison with NaN is false, so NaN stays NaN as in torch.relu.
    out = tl.where(acc < 0.0, 0.0, acc).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row + offs_c[None, :], out, mask=mask)


def message_passing_fwd(
    h: Tensor,
    p: Tensor,
    table_fwd: Tensor,
    table_inv: Tensor,
    self_table: Tensor,
    weight: Tensor,
    bias: Tensor,
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
    node_graph: Tensor,
) -> Tensor:
    """Launches the layer; see `dragkit::message_passing_fwd`."""
    num_nodes, num_columns = h.shape
    out = h.new_empty(num_nodes, num_columns)
    tile = layer_tile(num_columns, table_fwd.dtype)
    grid = tile.grid(num_nodes, num_columns)
    if out.numel() == 0:
        return out
    on_tensor_cores = h.dtype == weight.dtype and h.dtype in TENSOR_CORE_DTYPES
    whole = None if on_tensor_cores else product(h, weight, torch.float32)
    p, table_fwd, table_inv, self_table = (
        x.contiguous() for x in (p, table_fwd, table_inv, self_table)
    )
    walks = (head, tail, tail_ptr, tail_fact, head_ptr, head_fact, fact_pair, head_count)
    walks = tuple(x.contiguous() for x in (*walks, tail_count))
    head, tail, tail_ptr, tail_fact, head_ptr, head_fact, fact_pair, head_count, tail_count = walks
    chunks = (
        chunk_sums(tail_ptr, tail, tail_fact, fact_pair, head, tail_count, p, table_fwd),
        chunk_sums(head_ptr, head, head_fact, fact_pair, tail, head_count, p, table_inv),
    )
    _message_passing_fwd_kernel[grid](
        h.contiguous() if on_tensor_cores else None,
        *(p, table_fwd, table_inv, self_table),
        # One small copy where it is strided, in place of a kernel for each way it may be.
        weight.contiguous() if on_tensor_cores else None,
        bias.contiguous(),
        *walks,
        node_graph.contiguous(),
        whole,
        *chunks,
        out,
        num_nodes,
        num_columns,
        BLOCK_N=tile.rows,
        BLOCK_K=DEPTH,
        BLOCK_C=tile.columns,
        **tile.options,
    )
    return out


_FUSED = {"product_ptr": None}
_LIBRARY = {"h_ptr": None, "weight_ptr": None, "product_ptr": "*fp32"}
_WAYS = (("*bf16", _FUSED), ("*bf16", _LIBRARY), ("*fp32", _LIBRARY))
KERNELS = tuple(
    wide_spec(
        _message_passing_fwd_kernel,
        kind,
        layer_tile(columns, DTYPES[kind]),
        "BLOCK_N",
        Budget(registers=128, shared=40960, wide_loads=8, products=16 if types is _FUSED else 0),
        types,
        {"BLOCK_K": DEPTH},
        chunks,
    )
    for columns in COLUMNS
    for chunks in (None, "*fp32")
    for kind, types in _WAYS
)
