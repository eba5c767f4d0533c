"""Rows of matrices gathered and added up, with gradients that are sums in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_float, check_index, check_shape
from ..orders import FactGroups, FactIndex, GroupedIndex, check_grouped_index
from . import op as _op  # noqa: F401  (registers the ops)
from .reference import gather_rows_ref, segment_sum_ref

__all__ = [
    "fact_rows",
    "gather_rows",
    "gather_rows_ref",
    "segment_sum",
    "segment_sum_ref",
]


def gather_rows(
    table: Tensor, rows: Tensor, *, by_row: GroupedIndex | None = None, backend: str = "auto"
) -> Tensor:
    """out_i = table[rows_i]; backward: dtable_r = sum of grad_i over the places i of row r.

    Args:
        table: float [R, C].
        rows: int32 [P], in any sequence.
        by_row: `grouped_index(rows, R)`, for callers with several gathers of the same rows. Only
            the kernels' backward reads it, and makes it if None.
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
    if by_row is not None:
        check_grouped_index(op, "by_row", by_row, rows.shape[0], table.shape[0])
    triton = resolve_backend(op, table, backend) == "triton"
    return torch.ops.dragkit.gather_rows_fwd(table, rows, list(by_row or ()), triton)


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
    fact_index: FactIndex,
    groups: FactGroups | None = None,
    backend: str = "auto",
) -> Tensor:
    """Representations of selected facts: [node[head_q] ; relation[pair_q] ; node[tail_q]].

    q is the row of fact index_p in the orders. An empty place gives zeros and no gradient.

    Args:
        node: float [N, C]; relation: float [P, D] with the dtype of `node`.
        index: int32 [...] facts, -1 for an empty place. A fact may be at several places.
        fact_index: Q facts; groups: the E facts that these stand for; None if each is its own.
        backend: "auto", "triton" or "torch".

    Returns:
        [..., 2C + D] with the dtype of `node`.

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    op = "fact_rows"
    check_shape(op, "node", node, (fact_index.num_nodes, None))
    check_shape(op, "relation", relation, (fact_index.num_pairs, None))
    check_float(op, node=node, relation=relation)
    if relation.dtype != node.dtype:
        raise ValueError(
            f"{op}: node {list(node.shape)} and relation {list(relation.shape)} must share a "
            f"dtype, got {node.dtype} and {relation.dtype}"
        )
    check_index(op, index=index)
    if (fact_index.head if groups is None else groups.row).shape[0] == 0:  # every place is empty
        return node.new_zeros(*index.shape, 2 * node.shape[1] + relation.shape[1])
    place = index.flatten()
    row = place.clamp(min=0)
    if groups is not None:
        row = groups.row.index_select(0, row)
    # One gather for both ends, so that one sum orders all that a node receives: heads, then tails.
    ends = torch.cat([fact_index.head.index_select(0, row), fact_index.tail.index_select(0, row)])
    head, tail = gather_rows(node, ends, backend=backend).chunk(2)
    pair = gather_rows(relation, fact_index.fact_pair.index_select(0, row), backend=backend)
    out = torch.cat([head, pair, tail], 1)
    # Fact 0 stands in at an empty place. The selection keeps its NaN out, and any gradient.
    out = out.masked_fill((place < 0).unsqueeze(1), 0.0)
    return out.view(*index.shape, out.shape[1])
