"""Triton backward of gather_rows, fact_rows and gated_rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Budget
from ..orders import RowOrder, row_order
from .forward import GATE_TILE, row_spec
from .places import places_of
from .sums import sum_by


@triton.jit(do_not_specialize=["num_rows"])
def _gated_rows_bwd_kernel(
    grad_ptr,
    vectors_ptr,
    gate_ptr,
    d_vectors_ptr,
    d_gate_ptr,
    num_rows,
    num_columns,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dvectors_i = gate_i grad_i and dgate_i = <grad_i, vectors_i>, those with a place to go."""
    offs_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < num_rows
    gate = tl.load(gate_ptr + offs_p, mask=mask_p, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, num_columns, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mask = mask_p[:, None] & (offs_c < num_columns)[None, :]
        at = offs_p[:, None] * num_columns + offs_c[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if d_vectors_ptr is not None:
            value = (grad * gate[:, None]).to(d_vectors_ptr.dtype.element_ty)
            tl.store(d_vectors_ptr + at, value, mask=mask)
        if d_gate_ptr is not None:
            vectors = tl.load(vectors_ptr + at, mask=mask, other=0.0).to(tl.float32)
            acc = tl.fma(grad, vectors, acc)
    if d_gate_ptr is not None:
        total = tl.sum(acc, 1).to(d_gate_ptr.dtype.element_ty)
        tl.store(d_gate_ptr + offs_p, total, mask=mask_p)


def gather_rows_bwd(
    grad: Tensor, rows: Tensor, place: Tensor | None, ptr: Tensor | None, num_rows: int
) -> Tensor:
    """Launches the ordered sum; see `dragkit::gather_rows_bwd`."""
    made = place is None or ptr is None
    order = row_order(rows, num_rows) if made else RowOrder(place, ptr)
    return sum_by(grad, order, num_columns=grad.shape[1])


def fact_rows_bwd(
    grad: Tensor,
    index: Tensor,
    head: Tensor,
    fact_pair: Tensor,
    tail: Tensor,
    group_row: Tensor | None,
    num_nodes: int,
    num_pairs: int,
    node_columns: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    """Launches one ordered sum per table; see `dragkit::fact_rows_bwd`."""
    relation_columns = grad.shape[1] - 2 * node_columns
    d_node = d_relation = grad.new_empty(0)
    rows = places_of(index, head, fact_pair, tail, group_row, num_nodes, num_pairs)
    if output_mask[0]:
        # A fact's tail is the second piece of its row: the places after those of all heads.
        order = row_order(torch.cat([rows.head, rows.tail]), num_nodes)
        jump = node_columns + relation_columns
        d_node = sum_by(grad, order, num_columns=node_columns, jump=jump)
    if output_mask[1]:
        order = row_order(rows.pair, num_pairs)
        d_relation = sum_by(grad, order, num_columns=relation_columns, first=node_columns)
    return d_node, d_relation


def gated_rows_bwd(
    grad: Tensor, vectors: Tensor, gate: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """Launches what output_mask asks for in one pass; see `dragkit::gated_rows_bwd`."""
    d_vectors = vectors.new_empty(vectors.shape if output_mask[0] else 0)
    d_gate = gate.new_empty(gate.shape if output_mask[1] else 0)
    if gate.numel() == 0:
        return d_vectors, d_gate
    _gated_rows_bwd_kernel[(triton.cdiv(vectors.shape[0], GATE_TILE.rows),)](
        *(x.contiguous() for x in (grad, vectors, gate)),
        d_vectors if output_mask[0] else None,
        d_gate if output_mask[1] else None,
        *vectors.shape,
        BLOCK_P=GATE_TILE.rows,
        BLOCK_C=GATE_TILE.columns,
        **GATE_TILE.options,
    )
    return d_vectors, d_gate


KERNELS = tuple(
    row_spec(
        _gated_rows_bwd_kernel,
        kind,
        GATE_TILE,
        Budget(registers=80, shared=512, wide_loads=1),
        gate_ptr="*fp32",
        d_vectors_ptr=d_vectors,
        d_gate_ptr=d_gate,
    )
    for kind in ("*bf16", "*fp32")
    for d_vectors, d_gate in ((kind, "*fp32"), (kind, None), (None, "*fp32"))
)
