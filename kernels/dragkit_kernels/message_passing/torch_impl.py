"""message_passing and relation_sum in PyTorch, with their backward written out.

On a CPU, embedding_bag is the gather-scale-sum of a whole direction and needs no [E, C] tensor. Its
own autograd would need one, and would sum the table's gradient fact by fact. Here the table's
gradient is the same bag over the (graph, relation) order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulator_dtype
from ..orders import FactIndex
from ..segments import bag_sum, ordered_sum, row_dots, segment_ptr
from .product import product


def message_passing_fwd(
    h: Tensor,
    p: Tensor,
    table_fwd: Tensor,
    table_inv: Tensor,
    self_table: Tensor,
    weight: Tensor,
    bias: Tensor,
    index: list[Tensor],
    node_graph: Tensor,
) -> Tensor:
    """The collapsed layer; see message_passing."""
    o = FactIndex(*index)
    dtype = accumulator_dtype(h, p, table_fwd, table_inv, self_table, weight, bias)
    p = p.to(dtype)
    out = product(h, weight, dtype).add_(bias)
    for table, source, count, order, ptr in (
        (table_fwd, o.head, o.tail_count, o.tail_perm, o.tail_ptr),
        (table_inv, o.tail, o.head_count, o.head_perm, o.head_ptr),
    ):
        sent = (p.index_select(0, source) * count).index_select(0, order)
        out += bag_sum(table.to(dtype), o.fact_pair.index_select(0, order), ptr, sent)
    out.addcmul_(p.unsqueeze(1), self_table.to(dtype).index_select(0, node_graph))
    return out.relu_().to(h.dtype)


def message_passing_bwd(
    grad: Tensor,
    h_out: Tensor,
    h: Tensor,
    p: Tensor,
    table_fwd: Tensor,
    table_inv: Tensor,
    self_table: Tensor,
    weight: Tensor,
    bias: Tensor,
    index: list[Tensor],
    node_graph: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of the seven float inputs; those not in output_mask come back empty."""
    o = FactIndex(*index)
    inputs = (h, p, table_fwd, table_inv, self_table, weight, bias)
    dtype = accumulator_dtype(*inputs)
    out = [x.new_empty(0) for x in inputs]
    p = p.to(dtype)
    # delta = dLoss/dpre; contiguous() because sum().backward() sends a zero-stride gradient.
    delta = torch.ops.aten.threshold_backward(grad, h_out, 0).to(dtype).contiguous()
    if output_mask[0]:
        out[0] = product(delta, weight.t(), dtype)
    if output_mask[1]:
        by_head = row_dots(table_fwd.to(dtype), o.fact_pair, delta, o.tail) * o.tail_count
        by_tail = row_dots(table_inv.to(dtype), o.fact_pair, delta, o.head) * o.head_count
        own = row_dots(
            self_table.to(dtype),
            node_graph,
            delta,
            torch.arange(p.shape[0], dtype=node_graph.dtype, device=p.device),
        )
        out[1] = own + ordered_sum(by_head, o.head_perm, o.head_ptr)
        out[1] += ordered_sum(by_tail, o.tail_perm, o.tail_ptr)
    for place, source, target, count in (
        (2, o.head, o.tail, o.tail_count),
        (3, o.tail, o.head, o.head_count),
    ):
        if output_mask[place]:
            sent = (p.index_select(0, source) * count).index_select(0, o.pair_perm)
            out[place] = bag_sum(delta, target.index_select(0, o.pair_perm), o.pair_ptr, sent)
    if output_mask[4]:
        nodes = torch.arange(p.shape[0], dtype=torch.int32, device=p.device)
        out[4] = bag_sum(delta, nodes, segment_ptr(node_graph, self_table.shape[0]), p)
    if output_mask[5]:
        out[5] = product(h.t(), delta, dtype)
    if output_mask[6]:
        out[6] = delta.sum(0)
    return tuple(g.to(x.dtype) for g, x in zip(out, inputs, strict=True))


def relation_sum_fwd(table: Tensor, index: list[Tensor]) -> Tensor:
    """Sum of the rows of a node's facts in both directions; see relation_sum."""
    o, rows = FactIndex(*index), table.to(accumulator_dtype(table))

    def direction(count: Tensor, order: Tensor, ptr: Tensor) -> Tensor:
        times = count.index_select(0, order).to(rows.dtype)
        return bag_sum(rows, o.fact_pair.index_select(0, order), ptr, times)

    out = direction(o.tail_count, o.tail_perm, o.tail_ptr)
    return out.add_(direction(o.head_count, o.head_perm, o.head_ptr)).to(table.dtype)


def relation_sum_bwd(grad: Tensor, index: list[Tensor]) -> Tensor:
    """dtable_r = sum over the facts e of pair r of n_e grad[tail_e] + m_e grad[head_e]."""
    o, rows = FactIndex(*index), grad.to(accumulator_dtype(grad)).contiguous()

    def direction(count: Tensor, target: Tensor) -> Tensor:
        times = count.index_select(0, o.pair_perm).to(rows.dtype)
        return bag_sum(rows, target.index_select(0, o.pair_perm), o.pair_ptr, times)

    return direction(o.tail_count, o.tail).add_(direction(o.head_count, o.head)).to(grad.dtype)
