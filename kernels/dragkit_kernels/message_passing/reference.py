"""Message passing by its formulas: plain PyTorch, differentiable, no clever order of work."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulator_dtype
from ..noise import dropout_scale, dropped
from ..orders import FactOrders


def message_passing_ref(
    h: Tensor,
    p: Tensor,
    table_fwd: Tensor,
    table_inv: Tensor,
    self_table: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    orders: FactOrders,
    node_graph: Tensor,
) -> Tensor:
    """h'_v = relu(h_v W + b + sum_{e: t_e=v} n_e p[s_e] Y^F[pair_e]
    + sum_{e: s_e=v} m_e p[t_e] Y^I[pair_e] + p_v Y^self[graph_v]), with n the tail and m the head
    counts, summed in float32 (float64 if any argument is).
    """
    dtype = accumulator_dtype(h, p, table_fwd, table_inv, self_table, weight, bias)
    p, head, tail, pair = p.to(dtype), orders.head, orders.tail, orders.fact_pair
    sent, returned = p.index_select(0, head), p.index_select(0, tail)
    sent, returned = sent * orders.tail_count, returned * orders.head_count
    forward = sent.unsqueeze(1) * table_fwd.to(dtype).index_select(0, pair)
    inverse = returned.unsqueeze(1) * table_inv.to(dtype).index_select(0, pair)
    own = p.unsqueeze(1) * self_table.to(dtype).index_select(0, node_graph)
    out = torch.addmm(bias.to(dtype), h.to(dtype), weight.to(dtype)) + own
    out = out.index_add(0, tail, forward).index_add(0, head, inverse)
    return torch.relu(out).to(h.dtype)


def relation_sum_ref(table: Tensor, *, orders: FactOrders) -> Tensor:
    """out_v = sum_{e: t_e=v} n_e table[pair_e] + sum_{e: s_e=v} m_e table[pair_e]."""
    dtype = accumulator_dtype(table)
    rows = table.to(dtype).index_select(0, orders.fact_pair)
    out = rows.new_zeros(orders.num_nodes, table.shape[1])
    out = out.index_add(0, orders.tail, rows * orders.tail_count.unsqueeze(1))
    return out.index_add(0, orders.head, rows * orders.head_count.unsqueeze(1)).to(table.dtype)


def message_passing_parity_ref(
    p: Tensor,
    rel_fwd: Tensor,
    rel_inv: Tensor,
    self_fwd: Tensor,
    self_inv: Tensor,
    instruction: Tensor,
    *,
    orders: FactOrders,
    node_graph: Tensor,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """o_{v,k} = sum_e n_e p[src_e] relu(u[rel_e] * i_k) + p_v relu(u_self * i_k), both directions;
    with dropout those in `noise.dropped` are zero and the others scaled by 1 / (1 - dropout).

    relu(a b) = relu(a) relu(b) + relu(-a) relu(-b) takes the instruction out of the sum over
    facts: two C-wide sums per direction serve all instructions.
    """
    dtype = accumulator_dtype(p, rel_fwd, rel_inv, self_fwd, self_inv, instruction)
    p, instruction = p.to(dtype), instruction.to(dtype)
    relation = orders.pair_relation.index_select(0, orders.fact_pair)
    gate = torch.cat([instruction.relu(), (-instruction).relu()], dim=2)
    gate = gate.index_select(0, node_graph)  # [N, I, 2C]
    width = rel_fwd.shape[1]
    sums = []
    for u, own, source, count, order, ptr in (
        (rel_fwd, self_fwd, orders.head, orders.tail_count, orders.tail_fact, orders.tail_ptr),
        (rel_inv, self_inv, orders.tail, orders.head_count, orders.head_fact, orders.head_ptr),
    ):
        u, own = u.to(dtype), own.to(dtype)
        split = torch.cat([u.relu(), (-u).relu()], dim=1)
        weight = (p.index_select(0, source) * count).index_select(0, order)
        # Facts after the last offset, as padding has them, have no weight; but embedding_bag would
        # leave their gradient unwritten, so they go to the last node.
        whole = torch.cat([ptr[:-1], ptr.new_full((1,), order.shape[0])])
        total = F.embedding_bag(
            relation.index_select(0, order),
            split,
            whole,
            mode="sum",
            per_sample_weights=weight,
            include_last_offset=True,
        )
        total = total + p.unsqueeze(1) * torch.cat([own.relu(), (-own).relu()])
        product = total.unsqueeze(1) * gate
        sums.append(product[..., :width] + product[..., width:])
    out = torch.stack(sums, dim=2)
    if dropout > 0:
        drop = dropped(seed, out.shape[0], out.shape[1], width, dropout)
        out = torch.where(drop, 0.0, out * dropout_scale(dropout))
    return out.flatten(1, 2)
