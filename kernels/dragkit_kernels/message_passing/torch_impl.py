"""message_passing in PyTorch with its backward written out.

On a CPU, embedding_bag gathers, scales and sums a whole direction without an [E, C] tensor. Its own
autograd would allocate one, and would add the table's gradient fact by fact. Here the gradient of
the table is one more bag, over facts sorted by (graph, relation) pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulator_dtype
from ..orders import FactIndex
from ..segments import bag_sum, ordered_sum, row_dots, segment_ptr


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, also under torch.autocast, which applies inside an op's implementation."""
    a, b = a.to(dtype), b.to(dtype)
    # Entering the context costs as much as a small product.
    if not torch.is_autocast_enabled(a.device.type):
        return a @ b
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


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
    """The layer (see `message_passing`)."""
    facts = FactIndex(*index)
    dtype = accumulator_dtype(h, p, table_fwd, table_inv, self_table, weight, bias)
    p = p.to(dtype)
    out = matmul(h, weight, dtype).add_(bias)
    for table, sender, count, perm, ptr in (
        (table_fwd, facts.head, facts.tail_count, facts.tail_perm, facts.tail_ptr),
        (table_inv, facts.tail, facts.head_count, facts.head_perm, facts.head_ptr),
    ):
        message_weight = (p.index_select(0, sender) * count).index_select(0, perm)
        pair = facts.fact_pair.index_select(0, perm)
        out += bag_sum(table.to(dtype), pair, ptr, message_weight)
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
    """Gradients of the seven float inputs. Those outside `output_mask` are empty, [0]."""
    facts = FactIndex(*index)
    inputs = (h, p, table_fwd, table_inv, self_table, weight, bias)
    dtype = accumulator_dtype(*inputs)
    out = [x.new_empty(0) for x in inputs]
    p = p.to(dtype)
    # The gradient of the relu's input. contiguous() because sum().backward() sends a gradient with
    # zero strides.
    delta = torch.ops.aten.threshold_backward(grad, h_out, 0).to(dtype).contiguous()
    if output_mask[0]:
        out[0] = matmul(delta, weight.t(), dtype)
    if output_mask[1]:
        nodes = torch.arange(p.shape[0], dtype=node_graph.dtype, device=p.device)
        fwd = row_dots(table_fwd.to(dtype), facts.fact_pair, delta, facts.tail) * facts.tail_count
        inv = row_dots(table_inv.to(dtype), facts.fact_pair, delta, facts.head) * facts.head_count
        out[1] = row_dots(self_table.to(dtype), node_graph, delta, nodes)
        out[1] = out[1] + ordered_sum(fwd, facts.head_perm, facts.head_ptr)
        out[1] += ordered_sum(inv, facts.tail_perm, facts.tail_ptr)
    for i, sender, receiver, count in (
        (2, facts.head, facts.tail, facts.tail_count),
        (3, facts.tail, facts.head, facts.head_count),
    ):
        if output_mask[i]:
            message_weight = (p.index_select(0, sender) * count).index_select(0, facts.pair_perm)
            node = receiver.index_select(0, facts.pair_perm)
            out[i] = bag_sum(delta, node, facts.pair_ptr, message_weight)
    if output_mask[4]:
        nodes = torch.arange(p.shape[0], dtype=torch.int32, device=p.device)
        out[4] = bag_sum(delta, nodes, segment_ptr(node_graph, self_table.shape[0]), p)
    if output_mask[5]:
        out[5] = matmul(h.t(), delta, dtype)
    if output_mask[6]:
        out[6] = delta.sum(0)
    return tuple(g.to(x.dtype) for g, x in zip(out, inputs, strict=True))
