"""dragkit::message_passing_* and relation_sum_*: one opaque op forward, one backward.

On CPU, embedding_bag is the gather-scale-sum of a whole direction and needs no [E, C] tensor; its
own autograd would, and sums the table's gradient fact by fact, so the backward is written out: the
table's gradient is the same bag over the (graph, relation) order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import HAS_TRITON
from ..checks import accumulator_dtype
from ..library import forbid_gradient, register, register_gradient
from ..segments import bag_sum, ordered_sum, row_dots, segment_ptr
from .product import product

if HAS_TRITON:
    from .backward import message_passing_bwd
    from .forward import message_passing_fwd
    from .relation import relation_sum_bwd, relation_sum_fwd
else:
    message_passing_bwd = message_passing_fwd = None
    relation_sum_bwd = relation_sum_fwd = None

_ORDERS = (
    "Tensor head, Tensor tail, Tensor tail_ptr, Tensor tail_fact, Tensor head_ptr, "
    "Tensor head_fact, Tensor pair_ptr, Tensor pair_fact, Tensor fact_pair, Tensor head_count, "
    "Tensor tail_count"
)
_INPUTS = (
    "Tensor h, Tensor p, Tensor table_fwd, Tensor table_inv, Tensor self_table, Tensor weight, "
    f"Tensor bias, {_ORDERS}, Tensor node_graph"
)
_NUM_DIFFERENTIABLE = 7


def _torch_message_passing_fwd(
    h: Tensor,
    p: Tensor,
    table_fwd: Tensor,
    table_inv: Tensor,
    self_table: Tensor,
    weight: Tensor,
    bias: Tensor,
    head: Tensor,
    tail: Tensor,
    tail_ptr: Tensor,
    tail_fact: Tensor,
    head_ptr: Tensor,
    head_fact: Tensor,
    pair_ptr: Tensor,
    pair_fact: Tensor,
    fact_pair: Tensor,
    head_count: Tensor,
    tail_count: Tensor,
    node_graph: Tensor,
) -> Tensor:
    """The collapsed layer; see message_passing."""
    dtype = accumulator_dtype(h, p, table_fwd, table_inv, self_table, weight, bias)
    p = p.to(dtype)
    out = product(h, weight, dtype).add_(bias)
    for table, source, count, order, ptr in (
        (table_fwd, head, tail_count, tail_fact, tail_ptr),
        (table_inv, tail, head_count, head_fact, head_ptr),
    ):
        sent = (p.index_select(0, source) * count).index_select(0, order)
        out += bag_sum(table.to(dtype), fact_pair.index_select(0, order), ptr, sent)
    out.addcmul_(p.unsqueeze(1), self_table.to(dtype).index_select(0, node_graph))
    return out.relu_().to(h.dtype)


def _torch_message_passing_bwd(
    grad: Tensor,
    h_out: Tensor,
    h: Tensor,
    p: Tensor,
    table_fwd: Tensor,
    table_inv: Tensor,
    self_table: Tensor,
    weight: Tensor,
    bias: Tensor,
    head: Tensor,
    tail: Tensor,
    tail_ptr: Tensor,
    tail_fact: Tensor,
    head_ptr: Tensor,
    head_fact: Tensor,
    pair_ptr: Tensor,
    pair_fact: Tensor,
    fact_pair: Tensor,
    head_count: Tensor,
    tail_count: Tensor,
    node_graph: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of the seven float inputs; those not in output_mask come back empty."""
    inputs = (h, p, table_fwd, table_inv, self_table, weight, bias)
    dtype = accumulator_dtype(*inputs)
    out = [x.new_empty(0) for x in inputs]
    p = p.to(dtype)
    # delta = dLoss/dpre; contiguous() because sum().backward() sends a zero-stride gradient.
    delta = torch.ops.aten.threshold_backward(grad, h_out, 0).to(dtype).contiguous()
    if output_mask[0]:
        out[0] = product(delta, weight.t(), dtype)
    if output_mask[1]:
        by_head = row_dots(table_fwd.to(dtype), fact_pair, delta, tail) * tail_count
        by_tail = row_dots(table_inv.to(dtype), fact_pair, delta, head) * head_count
        own = row_dots(
            self_table.to(dtype),
            node_graph,
            delta,
            torch.arange(p.shape[0], dtype=node_graph.dtype, device=p.device),
        )
        out[1] = own + ordered_sum(by_head, head_fact, head_ptr)
        out[1] += ordered_sum(by_tail, tail_fact, tail_ptr)
    for place, source, target, count in ((2, head, tail, tail_count), (3, tail, head, head_count)):
        if output_mask[place]:
            sent = (p.index_select(0, source) * count).index_select(0, pair_fact)
            out[place] = bag_sum(delta, target.index_select(0, pair_fact), pair_ptr, sent)
    if output_mask[4]:
        nodes = torch.arange(p.shape[0], dtype=torch.int32, device=p.device)
        out[4] = bag_sum(delta, nodes, segment_ptr(node_graph, self_table.shape[0]), p)
    if output_mask[5]:
        out[5] = product(h.t(), delta, dtype)
    if output_mask[6]:
        out[6] = delta.sum(0)
    return tuple(g.to(x.dtype) for g, x in zip(out, inputs, strict=True))


def _message_passing_fake(h: Tensor, *args: object) -> Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _message_passing_bwd_fake(grad: Tensor, h_out: Tensor, *args: object) -> tuple[Tensor, ...]:
    inputs, mask = args[:_NUM_DIFFERENTIABLE], args[-2]
    return tuple(
        x.new_empty(x.shape) if wanted else x.new_empty(0)
        for x, wanted in zip(inputs, mask, strict=True)
    )


def _message_passing_setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    *tensors, ctx.triton = inputs
    ctx.save_for_backward(output, *tensors)


def _message_passing_backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
    mask = list(ctx.needs_input_grad[:_NUM_DIFFERENTIABLE])
    grads = torch.ops.dragkit.message_passing_bwd(grad, *ctx.saved_tensors, mask, ctx.triton)
    wanted = tuple(g if need else None for g, need in zip(grads, mask, strict=True))
    return wanted + (None,) * (len(ctx.needs_input_grad) - _NUM_DIFFERENTIABLE)


def _torch_relation_sum_fwd(
    table: Tensor,
    head: Tensor,
    tail: Tensor,
    tail_ptr: Tensor,
    tail_fact: Tensor,
    head_ptr: Tensor,
    head_fact: Tensor,
    pair_ptr: Tensor,
    pair_fact: Tensor,
    fact_pair: Tensor,
    head_count: Tensor,
    tail_count: Tensor,
) -> Tensor:
    """Sum of the rows of a node's facts in both directions; see relation_sum."""
    rows = table.to(accumulator_dtype(table))
    out = None
    for count, order, ptr in ((tail_count, tail_fact, tail_ptr), (head_count, head_fact, head_ptr)):
        times = count.index_select(0, order).to(rows.dtype)
        part = bag_sum(rows, fact_pair.index_select(0, order), ptr, times)
        out = part if out is None else out.add_(part)
    return out.to(table.dtype)


def _torch_relation_sum_bwd(
    grad: Tensor,
    head: Tensor,
    tail: Tensor,
    pair_ptr: Tensor,
    pair_fact: Tensor,
    fact_pair: Tensor,
    head_count: Tensor,
    tail_count: Tensor,
) -> Tensor:
    """dtable_r = sum over the facts e of pair r of n_e grad[tail_e] + m_e grad[head_e]."""
    rows = grad.to(accumulator_dtype(grad)).contiguous()
    out = None
    for count, target in ((tail_count, tail), (head_count, head)):
        times = count.index_select(0, pair_fact).to(rows.dtype)
        part = bag_sum(rows, target.index_select(0, pair_fact), pair_ptr, times)
        out = part if out is None else out.add_(part)
    return out.to(grad.dtype)


def _relation_sum_fake(
    table: Tensor, head: Tensor, tail: Tensor, tail_ptr: Tensor, *rest: object
) -> Tensor:
    return table.new_empty(tail_ptr.shape[0] - 1, table.shape[1])


def _relation_sum_bwd_fake(
    grad: Tensor, head: Tensor, tail: Tensor, pair_ptr: Tensor, *rest: object
) -> Tensor:
    return grad.new_empty(pair_ptr.shape[0] - 1, grad.shape[1])


def _relation_sum_setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    _, head, tail, _, _, _, _, *rest, ctx.triton = inputs
    ctx.save_for_backward(head, tail, *rest)


def _relation_sum_backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (torch.ops.dragkit.relation_sum_bwd(grad, *ctx.saved_tensors, ctx.triton), *(None,) * 12)


register(
    f"message_passing_fwd({_INPUTS}, bool triton) -> Tensor",
    _torch_message_passing_fwd,
    _message_passing_fake,
    triton=message_passing_fwd,
)
register(
    f"message_passing_bwd(Tensor grad, Tensor h_out, {_INPUTS}, bool[] output_mask, bool triton) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _torch_message_passing_bwd,
    _message_passing_bwd_fake,
    triton=message_passing_bwd,
)
register_gradient("message_passing_fwd", _message_passing_backward, _message_passing_setup)
register(
    f"relation_sum_fwd(Tensor table, {_ORDERS}, bool triton) -> Tensor",
    _torch_relation_sum_fwd,
    _relation_sum_fake,
    triton=relation_sum_fwd,
)
register(
    "relation_sum_bwd(Tensor grad, Tensor head, Tensor tail, Tensor pair_ptr, Tensor pair_fact, "
    "Tensor fact_pair, Tensor head_count, Tensor tail_count, bool triton) -> Tensor",
    _torch_relation_sum_bwd,
    _relation_sum_bwd_fake,
    triton=relation_sum_bwd,
)
register_gradient("relation_sum_fwd", _relation_sum_backward, _relation_sum_setup)
forbid_gradient("message_passing_bwd")
forbid_gradient("relation_sum_bwd")
