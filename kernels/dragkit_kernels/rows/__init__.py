"""Rows of matrices gathered, added up and scaled, with gradients that are sums in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_float, check_index, check_shape, widest
from ..orders import FactGroups, FactOrders, RowOrder, check_row_order
from . import facts as _facts  # noqa: F401  (registers the ops)
from . import op as _op  # noqa: F401  (registers the ops)
from .reference import fact_rows_ref, gated_rows_ref, gather_rows_ref, segment_sum_ref

__all__ = [
    "fact_rows",
    "fact_rows_ref",
    "gated_rows",
    "gated_rows_ref",
    "gather_rows",
    "gather_rows_ref",
    "segment_sum",
    "segment_sum_ref",
]


def gather_rows(
    table: Tensor, rows: Tensor, *, order: RowOrder | None = None, backend: str = "auto"
) -> Tensor:
    """out_i = table[rows_i]; backward: dtable_r = sum of grad_i over the places i of row r.

    Args:
        table: float [R, C].
        rows: int32 [P], in any sequence.
        order: `row_order(rows, R)`, for callers with several gathers of the same rows. Only the
            kernels' backward reads it, and makes it if None.
        backend: "auto", "triton" or "torch".

    Returns:
        [P, C] with the dtype of `table`.

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    op = "gather_rows"
    check_shape(op, "table", table, (None, None))
    check_shape(op, "rows", rows, (None,))
    check_float(op, table=table)
    check_index(op, rows=rows)
    if order is not None:
        check_row_order(op, "order", order, rows.shape[0], table.shape[0])
    triton = resolve_backend(op, table, backend) == "triton"
    return torch.ops.dragkit.gather_rows_fwd(table, rows, *(order or (None, None)), triton)


def segment_sum(
    value: Tensor, segment: Tensor, num_segments: int, *, backend: str = "auto"
) -> Tensor:
    """out_b = sum of value_t over the rows t of segment b, which follow one another.

    Args:
        value: float [T, C].
        segment: int32 [T] ascending, each below `num_segments`.
        num_segments: B; a segment may have no rows.
        backend: "auto", "triton" or "torch".

    Returns:
        [B, C] with the dtype of `value`, summed in float32 (float64 for float64).

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    op = "segment_sum"
    check_shape(op, "value", value, (None, None))
    check_shape(op, "segment", segment, (value.shape[0],))
    check_float(op, value=value)
    check_index(op, segment=segment)
    triton = resolve_backend(op, value, backend) == "triton"
    return torch.ops.dragkit.segment_sum_fwd(value, segment, num_segments, triton)


def fact_rows(
    node: Tensor,
    relation: Tensor,
    index: Tensor,
    *,
    orders: FactOrders,
    groups: FactGroups | None = None,
    backend: str = "auto",
) -> Tensor:
    """Representations of selected facts: [node[head_q] ; relation[pair_q] ; node[tail_q]].

    q is the row of fact index_p in the orders; an empty place gives zeros and no gradient.
    Backward: dnode_v = sum of the first part of grad_p over the places whose head is v and of its
    last part over those whose tail is v; drelation_r = sum of the middle over those of pair r.

    Args:
        node: float [N, C]; relation: float [P, D] with the dtype of `node`.
        index: int32 [...] facts, -1 for an empty place; a fact may stand at several places.
        orders: Q facts; groups: the E facts that they stand for; None where each is its own.
        backend: "auto", "triton" or "torch".

    Returns:
        [..., 2C + D] with the dtype of `node`.

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    op = "fact_rows"
    check_shape(op, "node", node, (orders.num_nodes, None))
    check_shape(op, "relation", relation, (orders.num_pairs, None))
    check_float(op, node=node, relation=relation)
    if relation.dtype != node.dtype:
        raise ValueError(
            f"{op}: node {list(node.shape)} and relation {list(relation.shape)} must share a "
            f"dtype, got {node.dtype} and {relation.dtype}"
        )
    check_shape(op, "orders.fact_pair", orders.fact_pair, (orders.num_facts,))
    check_shape(op, "orders.tail", orders.tail, (orders.num_facts,))
    check_index(op, index=index, **{"orders.head": orders.head, "orders.tail": orders.tail})
    check_index(op, **{"orders.fact_pair": orders.fact_pair})
    if groups is not None:
        check_index(op, **{"groups.row": groups.row})
    out = torch.ops.dragkit.fact_rows_fwd(
        node,
        relation,
        index.flatten(),
        orders.head,
        orders.fact_pair,
        orders.tail,
        None if groups is None else groups.row,
        resolve_backend(op, node, backend) == "triton",
    )
    return out.view(*index.shape, out.shape[1])


def gated_rows(vectors: Tensor, gate: Tensor, *, backend: str = "auto") -> Tensor:
    """out_i = gate_i vectors_i.

    Backward, in one pass: dvectors_i = gate_i grad_i and dgate_i = <grad_i, vectors_i>.

    Args:
        vectors: float [..., M]; gate: float [...].
        backend: "auto", "triton" or "torch".

    Returns:
        [..., M] with the dtype of `vectors`; products and sums run in float32 (float64 if an
        argument is).

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    op = "gated_rows"
    check_shape(op, "gate", gate, tuple(vectors.shape[:-1]))
    check_float(op, vectors=vectors, gate=gate)
    triton = resolve_backend(op, widest(vectors, gate), backend) == "triton"
    rows = vectors.reshape(gate.numel(), vectors.shape[-1])
    out = torch.ops.dragkit.gated_rows_fwd(rows, gate.flatten(), triton)
    return out.view(vectors.shape)
