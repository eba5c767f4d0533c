"""Message passing by its formulas: plain PyTorch, differentiable, no clever order of work."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulator_dtype
from ..orders import FactIndex


def message_passing_ref(
    h: Tensor,
    p: Tensor,
    table_fwd: Tensor,
    table_inv: Tensor,
    self_table: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    fact_index: FactIndex,
    node_graph: Tensor,
) -> Tensor:
    """h'_v = relu(h_v W + b + sum_{e: t_e=v} n_e p[s_e] Y^F[pair_e]
    + sum_{e: s_e=v} m_e p[t_e] Y^I[pair_e] + p_v Y^self[graph_v]), with n the tail and m the head
    counts, summed in float32 (float64 if any argument is).
    """
    dtype = accumulator_dtype(h, p, table_fwd, table_inv, self_table, weight, bias)
    p, head, tail, pair = p.to(dtype), fact_index.head, fact_index.tail, fact_index.fact_pair
    sent, returned = p.index_select(0, head), p.index_select(0, tail)
    sent, returned = sent * fact_index.tail_count, returned * fact_index.head_count
    forward = sent.unsqueeze(1) * table_fwd.to(dtype).index_select(0, pair)
    inverse = returned.unsqueeze(1) * table_inv.to(dtype).index_select(0, pair)
    own = p.unsqueeze(1) * self_table.to(dtype).index_select(0, node_graph)
    out = torch.addmm(bias.to(dtype), h.to(dtype), weight.to(dtype)) + own
    out = out.index_add(0, tail, forward).index_add(0, head, inverse)
    return torch.relu(out).to(h.dtype)


def relation_sum_ref(table: Tensor, *, fact_index: FactIndex) -> Tensor:
    """out_v = sum_{e: t_e=v} n_e table[pair_e] + sum_{e: s_e=v} m_e table[pair_e]."""
    dtype = accumulator_dtype(table)
    rows = table.to(dtype).index_select(0, fact_index.fact_pair)
    out = rows.new_zeros(fact_index.num_nodes, table.shape[1])
    out = out.index_add(0, fact_index.tail, rows * fact_index.tail_count.unsqueeze(1))
    return out.index_add(0, fact_index.head, rows * fact_index.head_count.unsqueeze(1)).to(
        table.dtype
    )
