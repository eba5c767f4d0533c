"""Row ops by their formulas: plain PyTorch, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from ..orders import FactGroups, FactOrders


def gather_rows_ref(table: Tensor, rows: Tensor) -> Tensor:
    """out_i = table[rows_i]."""
    return table[rows.long()]


def segment_sum_ref(value: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """out_b = sum of value_t over segment_t = b."""
    out = value.new_zeros(num_segments, *value.shape[1:])
    return out.index_add(0, segment.long(), value)


def fact_rows_ref(
    node: Tensor,
    relation: Tensor,
    index: Tensor,
    *,
    orders: FactOrders,
    groups: FactGroups | None = None,
) -> Tensor:
    """[node[head_q] ; relation[pair_q] ; node[tail_q]], q = row of the fact, or zeros for -1."""
    facts = [
        node[orders.head.long()],
        relation[orders.fact_pair.long()],
        node[orders.tail.long()],
    ]
    table = torch.cat(facts, 1)
    if groups is not None:
        table = table[groups.row.long()]
    # An empty place, -1, is the last row of the table.
    return torch.cat([table, table.new_zeros(1, table.shape[1])])[index.long()]


def gated_rows_ref(vectors: Tensor, gate: Tensor) -> Tensor:
    """gate_i vectors_i, rounded once to the dtype of the vectors."""
    return (vectors * gate.unsqueeze(-1)).to(vectors.dtype)
