"""Triton forward of relation_gate: a tile of pairs by a block of columns, all instructions."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import ROW_TILE, ResourceLimits, spec


@triton.jit
def product_gate(u, instruction, value, like_ptr):
    """`value` where u times instruction is positive or NaN in the dtype of `like`, else zero."""
    # Round first: a product that underflows in a low precision gave a zero output.
    product = (u * instruction).to(like_ptr.dtype.element_ty).to(tl.float32)
    return tl.where(product <= 0.0, 0.0, value)


@triton.jit(do_not_specialize=["num_pairs", "num_relations", "num_instructions"])
def _relation_gate_fwd_kernel(
    relation_ptr,
    instruction_ptr,
    pair_relation_ptr,
    pair_graph_ptr,
    out_ptr,
    num_pairs,
    num_relations,
    num_instructions,
    num_columns,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """c[d, r, k] = relu(u[d, relation_r] i[graph_r, k]) for a tile of pairs r and a direction d."""
    pid_d = tl.program_id(2).to(tl.int64)
    offs_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < num_pairs
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = mask_p[:, None] & (offs_c < num_columns)[None, :]
    relation = tl.load(pair_relation_ptr + offs_p, mask=mask_p, other=0).to(tl.int64)
    graph = tl.load(pair_graph_ptr + offs_p, mask=mask_p, other=0).to(tl.int64)
    offs = (pid_d * num_relations + relation)[:, None] * num_columns + offs_c[None, :]
    # All instructions of a pair share this row: it is loaded once.
    u = tl.load(relation_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    for k in range(0, num_instructions):
        offs = (graph * num_instructions + k)[:, None] * num_columns + offs_c[None, :]
        value = u * tl.load(instruction_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        # A comparison with NaN is false, so NaN stays NaN as in torch.relu.
        value = tl.where(value <= 0.0, 0.0, value)
        row = (pid_d * num_pairs + offs_p) * num_instructions + k
        offs = row[:, None] * num_columns + offs_c[None, :]
        tl.store(out_ptr + offs, value.to(out_ptr.dtype.element_ty), mask=mask)


def relation_gate_fwd(
    relation: Tensor,
    instruction: Tensor,
    pair_relation: Tensor,
    pair_graph: Tensor,
    grouped: list[Tensor],
) -> Tensor:
    """Launches the products (see `dragkit::relation_gate_fwd`)."""
    num_pairs, num_columns = pair_relation.shape[0], relation.shape[2]
    out = relation.new_empty(2, num_pairs, *instruction.shape[1:])
    if out.numel() == 0:
        return out
    _relation_gate_fwd_kernel[(*ROW_TILE.grid(num_pairs, num_columns), 2)](
        *(x.contiguous() for x in (relation, instruction, pair_relation, pair_graph)),
        out,
        num_pairs,
        relation.shape[1],
        instruction.shape[1],
        num_columns,
        BLOCK_P=ROW_TILE.rows,
        BLOCK_C=ROW_TILE.columns,
        **ROW_TILE.options,
    )
    return out


KERNELS = tuple(
    spec(
        _relation_gate_fwd_kernel,
        ResourceLimits(registers=80, shared_bytes=8192, vector_loads=3),
        tile=ROW_TILE,
        dtype=dtype,
    )
    for dtype in ("*bf16", "*fp32")
)
