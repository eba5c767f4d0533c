"""Triton backward of relation_gate: ordered sums per relation and per graph.

The kernels neither read the output nor write anything of its size. They recompute where it is
positive from the two factors. Each program keeps one factor in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import ROW_TILE, ResourceLimits, spec
from ..library import empty_gradients
from ..orders import grouped_index
from .forward import product_gate


@triton.jit(do_not_specialize=["num_pairs", "num_relations", "num_instructions"])
def _relation_gate_bwd_relation_kernel(
    grad_ptr,
    relation_ptr,
    instruction_ptr,
    pair_graph_ptr,
    perm_ptr,
    rowptr_ptr,
    d_relation_ptr,
    num_pairs,
    num_relations,
    num_instructions,
    num_columns,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """du[d, r] = sum over the pairs of relation r and over k of delta[d, pair, k] i[graph, k]."""
    pid_r = tl.program_id(0).to(tl.int64)
    pid_d = tl.program_id(2).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_columns
    row_offs = (pid_d * num_relations + pid_r) * num_columns + offs_c
    u = tl.load(relation_ptr + row_offs, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    end = tl.load(rowptr_ptr + pid_r + 1)
    # Lane i adds every BLOCK_P-th pair. One reduction at the end keeps the order fixed.
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(tl.load(rowptr_ptr + pid_r), end, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask_p = offs_p < end
        pair = tl.load(perm_ptr + offs_p, mask=mask_p, other=0).to(tl.int64)
        graph = tl.load(pair_graph_ptr + pair, mask=mask_p, other=0).to(tl.int64)
        mask = mask_p[:, None] & mask_c[None, :]
        for k in range(0, num_instructions):
            offs = (graph * num_instructions + k)[:, None] * num_columns + offs_c[None, :]
            gate = tl.load(instruction_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            row = (pid_d * num_pairs + pair) * num_instructions + k
            offs = row[:, None] * num_columns + offs_c[None, :]
            # Masked lanes have gate and gradient 0, and add nothing.
            grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            acc = tl.fma(product_gate(u, gate, grad, relation_ptr), gate, acc)
    total = tl.sum(acc, 0).to(d_relation_ptr.dtype.element_ty)
    tl.store(d_relation_ptr + row_offs, total, mask=mask_c)


@triton.jit(do_not_specialize=["num_pairs", "num_relations", "num_instructions"])
def _relation_gate_bwd_instruction_kernel(
    grad_ptr,
    relation_ptr,
    instruction_ptr,
    pair_relation_ptr,
    perm_ptr,
    rowptr_ptr,
    d_instruction_ptr,
    num_pairs,
    num_relations,
    num_instructions,
    num_columns,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """di[g, k] = sum over the pairs of graph g and over d of delta[d, pair, k] u[d, relation]."""
    pid_i = tl.program_id(0).to(tl.int64)  # row of the flattened [B * I, C] instructions
    graph, k = pid_i // num_instructions, pid_i % num_instructions
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_columns
    row_offs = pid_i * num_columns + offs_c
    gate = tl.load(instruction_ptr + row_offs, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    end = tl.load(rowptr_ptr + graph + 1)
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(tl.load(rowptr_ptr + graph), end, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask_p = offs_p < end
        pair = tl.load(perm_ptr + offs_p, mask=mask_p, other=0).to(tl.int64)
        relation = tl.load(pair_relation_ptr + pair, mask=mask_p, other=0).to(tl.int64)
        mask = mask_p[:, None] & mask_c[None, :]
        for d in tl.static_range(2):
            offs = (relation + d * num_relations)[:, None] * num_columns + offs_c[None, :]
            u = tl.load(relation_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            row = (pair + d * num_pairs) * num_instructions + k
            offs = row[:, None] * num_columns + offs_c[None, :]
            grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            acc = tl.fma(product_gate(u, gate, grad, relation_ptr), u, acc)
    total = tl.sum(acc, 0).to(d_instruction_ptr.dtype.element_ty)
    tl.store(d_instruction_ptr + row_offs, total, mask=mask_c)


def relation_gate_bwd(
    grad: Tensor,
    out: Tensor | None,
    relation: Tensor,
    instruction: Tensor,
    pair_relation: Tensor,
    pair_graph: Tensor,
    grouped: list[Tensor],
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    """Launches the sums that `output_mask` asks for (see `dragkit::relation_gate_bwd`)."""
    grad, relation, instruction = grad.contiguous(), relation.contiguous(), instruction.contiguous()
    num_graphs, num_instructions, num_columns = instruction.shape
    num_relations, num_pairs = relation.shape[1], pair_relation.shape[0]
    d_relation, d_instruction = empty_gradients((relation, instruction), output_mask)
    sizes = (num_pairs, num_relations, num_instructions, num_columns)
    constants = {"BLOCK_P": ROW_TILE.rows, "BLOCK_C": ROW_TILE.columns, **ROW_TILE.options}
    column_blocks = triton.cdiv(num_columns, ROW_TILE.columns)
    if not grouped:
        grouped = [
            *grouped_index(pair_relation, num_relations),
            *grouped_index(pair_graph, num_graphs),
        ]
    grouped = [x.contiguous() for x in grouped]
    if d_relation.numel() > 0:
        _relation_gate_bwd_relation_kernel[(num_relations, column_blocks, 2)](
            *(grad, relation, instruction, pair_graph.contiguous()),
            *grouped[:2],
            d_relation,
            *sizes,
            **constants,
        )
    if d_instruction.numel() > 0:
        _relation_gate_bwd_instruction_kernel[(num_graphs * num_instructions, column_blocks)](
            *(grad, relation, instruction, pair_relation.contiguous()),
            *grouped[2:],
            d_instruction,
            *sizes,
            **constants,
        )
    return d_relation, d_instruction


KERNELS = tuple(
    spec(
        kernel,
        ResourceLimits(registers=80, shared_bytes=8192, vector_loads=2),
        tile=ROW_TILE,
        dtype=dtype,
    )
    for kernel in (_relation_gate_bwd_relation_kernel, _relation_gate_bwd_instruction_kernel)
    for dtype in ("*bf16", "*fp32")
)
