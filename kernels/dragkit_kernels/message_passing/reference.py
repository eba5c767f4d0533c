"""message_passing by its formula: plain PyTorch, differentiable."""

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
    """h'_v = relu(h_v W + b + sum_{e: tail=v} n_e p[head_e] Y^F[pair_e]
    + sum_{e: head=v} m_e p[tail_e] Y^I[pair_e] + p_v Y^self[graph_v]) with n = tail_count and
    m = head_count, summed in float32 (float64 if an argument is float64).
    """
    dtype = accumulator_dtype(h, p, table_fwd, table_inv, self_table, weight, bias)
    p, head, tail, pair = p.to(dtype), fact_index.head, fact_index.tail, fact_index.fact_pair
    weight_fwd = p.index_select(0, head) * fact_index.tail_count
    weight_inv = p.index_select(0, tail) * fact_index.head_count
    message_fwd = weight_fwd.unsqueeze(1) * table_fwd.to(dtype).index_select(0, pair)
    message_inv = weight_inv.unsqueeze(1) * table_inv.to(dtype).index_select(0, pair)
    self_loop = p.unsqueeze(1) * self_table.to(dtype).index_select(0, node_graph)
    out = torch.addmm(bias.to(dtype), h.to(dtype), weight.to(dtype)) + self_loop
    out = out.index_add(0, tail, message_fwd).index_add(0, head, message_inv)
    return torch.relu(out).to(h.dtype)
