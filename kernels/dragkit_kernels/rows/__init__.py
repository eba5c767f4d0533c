"""Rows of matrices gathered and summed, with gradients that are sums in a fixed order."""

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
    """out_i = table[rows_i]. Backward: dtable_r = sum of grad_i over the i with rows_i = r.

    Args:
        table: float [R, C].
        rows: int32 [P], in any sequence.
        by_row: `grouped_index(rows, R)`, for callers with several gathers of the same rows. Only
            the kernels' backward reads it, and sorts `rows` if None.
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
    """out_b = sum of value_t over the rows t of segment b. The rows of a segment are adjacent.

    Args:
        value: float [T, C].
        segment: int32 [T] segment of each row, ascending and below `num_segments`.
        num_segments: B. A segment may be empty.
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
    """Vectors of selected facts: out_i = [node[head_q] ; relation[pair_q] ; node[tail_q]].

    q is the merged fact of fact index_i.

    Args:
        node: float [N, C].
        relation: float [P, D] with the dtype of `node`.
        index: int32 [...] selected facts, with repeats. -1 marks an empty position.
        fact_index: Q merged facts.
        groups: the E facts that these stand for. None if no facts were merged: E = Q.
        backend: "auto", "triton" or "torch".

    Returns:
        [..., 2C + D] with the dtype of `node`. An empty position gets zeros and no gradient.

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    op, facts = "fact_rows", fact_index
    check_shape(op, "node", node, (facts.num_nodes, None))
    check_shape(op, "relation", relation, (facts.num_pairs, None))
    check_float(op, node=node, relation=relation)
    if relation.dtype != node.dtype:
        raise ValueError(
            f"{op}: node and relation must share a dtype, got {node.dtype} and {relation.dtype}"
        )
    check_index(op, index=index)
    if (facts.head if groups is None else groups.row).shape[0] == 0:  # every position is empty
        return node.new_zeros(*index.shape, 2 * node.shape[1] + relation.shape[1])
    selected = index.flatten()
    row = selected.clamp(min=0)
    if groups is not None:
        row = groups.row.index_select(0, row)
    # One gather for both ends gives each node one sum of gradients, in a fixed order.
    ends = torch.cat([facts.head.index_select(0, row), facts.tail.index_select(0, row)])
    head, tail = gather_rows(node, ends, backend=backend).chunk(2)
    pair = gather_rows(relation, facts.fact_pair.index_select(0, row), backend=backend)
    out = torch.cat([head, pair, tail], 1)
    # An empty position gathered fact 0. masked_fill drops its values, even NaN, and its gradient.
    out = out.masked_fill((selected < 0).unsqueeze(1), 0.0)
    return out.view(*index.shape, out.shape[1])
