"""Triton forward of fact_rows and gated_rows; rows are gathered by the library."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import ROW_TILE, Budget, KernelSpec, WideTile

# Few rows, many columns: a program walks along them.
GATE_TILE = WideTile(rows=4, columns=256, num_warps=4)


@triton.jit
def _copy_rows(table_ptr, row, out_ptr, out_at, filled, mask_p, offs_c, num_columns):
    """out[out_at_i ...] = table[row_i], or zeros where a place is not filled."""
    mask_c = (offs_c < num_columns)[None, :]
    at = row[:, None].to(tl.int64) * num_columns + offs_c[None, :]
    value = tl.load(table_ptr + at, mask=filled[:, None] & mask_c, other=0.0)
    tl.store(out_ptr + out_at[:, None] + offs_c[None, :], value, mask=mask_p[:, None] & mask_c)


@triton.jit(do_not_specialize=["num_places"])
def _fact_rows_fwd_kernel(
    node_ptr,
    relation_ptr,
    index_ptr,
    head_ptr,
    fact_pair_ptr,
    tail_ptr,
    group_row_ptr,
    out_ptr,
    num_places,
    node_columns,
    relation_columns,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out_p = [node[head_q] ; relation[pair_q] ; node[tail_q]] with q = row of fact index_p."""
    offs_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < num_places
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.load(index_ptr + offs_p, mask=mask_p, other=-1)
    filled = row >= 0
    if group_row_ptr is not None:
        row = tl.load(group_row_ptr + row, mask=filled, other=0)
    head = tl.load(head_ptr + row, mask=filled, other=0)
    pair = tl.load(fact_pair_ptr + row, mask=filled, other=0)
    tail = tl.load(tail_ptr + row, mask=filled, other=0)
    at = offs_p * (2 * node_columns + relation_columns)
    _copy_rows(node_ptr, head, out_ptr, at, filled, mask_p, offs_c, node_columns)
    at += node_columns
    _copy_rows(relation_ptr, pair, out_ptr, at, filled, mask_p, offs_c, relation_columns)
    at += relation_columns
    _copy_rows(node_ptr, tail, out_ptr, at, filled, mask_p, offs_c, node_columns)


@triton.jit(do_not_specialize=["num_rows"])
def _gated_rows_fwd_kernel(
    vectors_ptr,
    gate_ptr,
    out_ptr,
    num_rows,
    num_columns,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out_i = gate_i vectors_i."""
    offs_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < num_rows
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = mask_p[:, None] & (offs_c < num_columns)[None, :]
    at = offs_p[:, None] * num_columns + offs_c[None, :]
    gate = tl.load(gate_ptr + offs_p, mask=mask_p, other=0.0).to(tl.float32)
    value = tl.load(vectors_ptr + at, mask=mask, other=0.0).to(tl.float32) * gate[:, None]
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=mask)


def fact_rows_fwd(
    node: Tensor,
    relation: Tensor,
    index: Tensor,
    head: Tensor,
    fact_pair: Tensor,
    tail: Tensor,
    group_row: Tensor | None,
) -> Tensor:
    """Launches the gathers; see `dragkit::fact_rows_fwd`."""
    num_places, columns = index.shape[0], (node.shape[1], relation.shape[1])
    out = node.new_empty(num_places, 2 * columns[0] + columns[1])
    if out.numel() == 0:
        return out
    _fact_rows_fwd_kernel[ROW_TILE.grid(num_places, max(columns))](
        *(x.contiguous() for x in (node, relation, index, head, fact_pair, tail)),
        None if group_row is None else group_row.contiguous(),
        out,
        num_places,
        *columns,
        BLOCK_P=ROW_TILE.rows,
        BLOCK_C=ROW_TILE.columns,
        **ROW_TILE.options,
    )
    return out


def gated_rows_fwd(vectors: Tensor, gate: Tensor) -> Tensor:
    """Launches the products; see `dragkit::gated_rows_fwd`."""
    out = vectors.new_empty(vectors.shape)
    if out.numel() == 0:
        return out
    _gated_rows_fwd_kernel[GATE_TILE.grid(*vectors.shape)](
        vectors.contiguous(),
        gate.contiguous(),
        out,
        *vectors.shape,
        BLOCK_P=GATE_TILE.rows,
        BLOCK_C=GATE_TILE.columns,
        **GATE_TILE.options,
    )
    return out


_INDEX = ("index_ptr", "head_ptr", "fact_pair_ptr", "tail_ptr", "group_row_ptr")


def row_spec(
    kernel: object, kind: str, tile: WideTile, budget: Budget, **types: str | None
) -> KernelSpec:
    """Specification of a kernel whose floats are of one kind but for those in `types`."""
    constants = {"BLOCK_P": tile.rows, "BLOCK_C": tile.columns}
    found = {
        name: "*i32" if name in _INDEX else kind if name.endswith("_ptr") else "i32"
        for name in kernel.arg_names
        if name not in constants
    }
    return KernelSpec(
        kernel,
        types={**found, **types},
        constants=constants,
        num_warps=tile.num_warps,
        budget=budget,
        divisible=tuple(name for name in found if name.endswith("_columns")),
        max_registers=tile.max_registers,
    )


KERNELS = tuple(
    spec
    for kind in ("*bf16", "*fp32")
    for spec in (
        *(
            row_spec(
                _fact_rows_fwd_kernel,
                kind,
                ROW_TILE,
                Budget(registers=80, shared=8192, wide_loads=6),
                group_row_ptr=group_row,
            )
            for group_row in ("*i32", None)
        ),
        row_spec(
            _gated_rows_fwd_kernel,
            kind,
            GATE_TILE,
            Budget(registers=64, shared=0, wide_loads=1),
            gate_ptr="*fp32",
        ),
    )
)
