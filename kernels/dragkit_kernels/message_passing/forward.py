"""Triton forward of message_passing, the whole layer in one launch, and of relation_sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import INTERPRETED
from ..launch import ResourceLimits, spec
from ..orders import FactIndex, contiguous_index
from .chunks import chunk_sums
from .product import product
from .tiles import COLUMNS, DTYPES, dot_tile, layer_tile
from .walk import Summand, add_chunks, add_rows, block_columns, block_rows

# Other dtypes leave the product to PyTorch. The interpreter computes bfloat16 products wrongly.
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
    product_ptr,
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

    The product h W is read from `product` or, with `h`, computed here on the tensor cores. Without
    a bias the two sums are all, and without p its factors are one.
    """
    offs_n, mask_n = block_rows(BLOCK_N, num_nodes)
    offs_c, mask_c = block_columns(BLOCK_C, num_columns)
    row = offs_n[:, None] * num_columns
    mask = mask_n[:, None] & mask_c[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    if h_ptr is not None:
        for start in range(0, num_columns, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            mask_k = offs_k < num_columns
            h_mask = mask_n[:, None] & mask_k[None, :]
            h = tl.load(h_ptr + row + offs_k[None, :], mask=h_mask, other=0.0)
            at = offs_k[:, None].to(tl.int64) * num_columns + offs_c[None, :]
            w_mask = mask_k[:, None] & mask_c[None, :]
            w = tl.load(weight_ptr + at, mask=w_mask, other=0.0)
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
    if chunk_in_ptr is not None:
        acc = add_chunks(acc, offs_n, mask_n, offs_c, num_columns, tail_rowptr_ptr, chunk_in_ptr)
        acc = add_chunks(acc, offs_n, mask_n, offs_c, num_columns, head_rowptr_ptr, chunk_out_ptr)

    if bias_ptr is not None:
        graph = tl.load(node_graph_ptr + offs_n, mask=mask_n, other=0).to(tl.int64)
        at = graph[:, None] * num_columns + offs_c[None, :]
        own = tl.load(self_table_ptr + at, mask=mask, other=0.0).to(tl.float32)
        p = tl.load(p_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        acc = tl.fma(p[:, None], own, acc)
        acc += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
        if product_ptr is not None:
            acc += tl.load(product_ptr + row + offs_c[None, :], mask=mask, other=0.0)
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
    """Launches the layer; see `dragkit::message_passing_fwd`."""
    out = h.new_empty(h.shape)
    if out.numel() == 0:
        return out
    fused = h.dtype == weight.dtype and h.dtype in TENSOR_CORE_DTYPES
    _launch(
        out,
        p.contiguous(),
        table_fwd.contiguous(),
        table_inv.contiguous(),
        contiguous_index(index),
        h=h.contiguous() if fused else None,
        # A strided weight is copied once: the copy is small, and programs read it row by row.
        weight=weight.contiguous() if fused else None,
        product=None if fused else product(h, weight, torch.float32),
        self_table=self_table.contiguous(),
        bias=bias.contiguous(),
        node_graph=node_graph.contiguous(),
    )
    return out


def relation_sum_fwd(table: Tensor, index: list[Tensor]) -> Tensor:
    """Launches the sum; see `dragkit::relation_sum_fwd`."""
    fact_index, table = contiguous_index(index), table.contiguous()
    out = table.new_empty(fact_index.num_nodes, table.shape[1])
    if out.numel() > 0:
        _launch(out, None, table, table, fact_index)
    return out


def _launch(
    out: Tensor,
    p: Tensor | None,
    table_fwd: Tensor,
    table_inv: Tensor,
    o: FactIndex,
    *,
    h: Tensor | None = None,
    weight: Tensor | None = None,
    product: Tensor | None = None,
    self_table: Tensor | None = None,
    bias: Tensor | None = None,
    node_graph: Tensor | None = None,
) -> None:
    """Fills `out`."""
    num_nodes, num_columns = out.shape
    incoming = Summand(o.tail_perm, o.fact_pair, o.head, o.tail_count, p, table_fwd)
    outgoing = Summand(o.head_perm, o.fact_pair, o.tail, o.head_count, p, table_inv)
    tile = (dot_tile if p is None else layer_tile)(num_columns, table_fwd.dtype)
    _message_passing_fwd_kernel[tile.grid(num_nodes, num_columns)](
        *(h, p, table_fwd, table_inv, self_table, weight, bias, product, o.head, o.tail),
        *(o.tail_ptr, o.tail_perm, o.head_ptr, o.head_perm, o.fact_pair),
        *(o.head_count, o.tail_count, node_graph),
        chunk_sums(o.tail_ptr, o.tail, incoming),
        chunk_sums(o.head_ptr, o.head, outgoing),
        out,
        num_nodes,
        num_columns,
        BLOCK_K=DEPTH,
        BLOCK_N=tile.rows,
        BLOCK_C=tile.columns,
        **tile.options,
    )


# Arguments that are None where PyTorch computes the product, where the kernel does, and in
# relation_sum.
_SEPARATE = dict.fromkeys(("h_ptr", "weight_ptr"))
_FUSED = {"product_ptr": None}
_SUMS = dict.fromkeys(
    ("h_ptr", "p_ptr", "self_table_ptr", "weight_ptr", "bias_ptr", "product_ptr", "node_graph_ptr")
)
KERNELS = tuple(
    spec(
        _message_passing_fwd_kernel,
        budget,
        tile=tile(columns, DTYPES[dtype]),
        dtype=dtype,
        constants={"BLOCK_K": DEPTH},
        **absent,
        **dict.fromkeys(("chunk_in_ptr", "chunk_out_ptr"), chunks),
    )
    for columns in COLUMNS
    for chunks in (None, "*fp32")
    for dtype, absent, tile, budget in (
        (
            "*bf16",
            _FUSED,
            layer_tile,
            ResourceLimits(128, shared_bytes=40960, vector_loads=8, mma_instructions=16),
        ),
        ("*bf16", _SEPARATE, layer_tile, ResourceLimits(128, shared_bytes=40960, vector_loads=8)),
        ("*fp32", _SEPARATE, layer_tile, ResourceLimits(128, shared_bytes=40960, vector_loads=8)),
        ("*bf16", _SUMS, dot_tile, ResourceLimits(80, shared_bytes=8192, vector_loads=4)),
        ("*fp32", _SUMS, dot_tile, ResourceLimits(80, shared_bytes=8192, vector_loads=4)),
    )
)
