"""dragkit::message_passing_parity_*: the un-collapsed sums, one opaque op forward, one backward.

Nothing of the dropout is kept for the backward: both draw the same words from the seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import HAS_TRITON
from ..checks import accumulator_dtype
from ..library import forbid_gradient, register, register_gradient
from ..noise import dropout_scale, dropped
from ..segments import bag_sum, ordered_sum, row_dots, segment_ptr
from .product import product

if HAS_TRITON:
    from .parity_backward import message_passing_parity_bwd
    from .parity_forward import message_passing_parity_fwd
else:
    message_passing_parity_bwd = message_passing_parity_fwd = None

_INPUTS = (
    "Tensor p, Tensor rel_fwd, Tensor rel_inv, Tensor self_fwd, Tensor self_inv, "
    "Tensor instruction, Tensor head, Tensor tail, Tensor tail_ptr, Tensor tail_fact, "
    "Tensor head_ptr, Tensor head_fact, Tensor pair_ptr, Tensor pair_fact, Tensor pair_relation, "
    "Tensor fact_pair, Tensor head_count, Tensor tail_count, Tensor node_graph, Tensor? seed, "
    "float dropout"
)
_NUM_DIFFERENTIABLE = 6


def _signs(x: Tensor, dim: int) -> Tensor:
    """[relu(x), relu(-x)] side by side."""
    return torch.cat([x.relu(), (-x).relu()], dim)


def _of_signs(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from that of `_signs(x, -1)`; zero where x is."""
    plus, minus = grad.chunk(2, -1)
    plus = torch.ops.aten.threshold_backward(plus, x, 0)
    return plus.sub_(torch.ops.aten.threshold_backward(minus, -x, 0))


def _sums(
    p: Tensor,
    u: Tensor,
    own: Tensor,
    relation: Tensor,
    source: Tensor,
    count: Tensor,
    order: Tensor,
    ptr: Tensor,
) -> Tensor:
    """[S+, S-] of every node in one direction, [N, 2C]."""
    sent = (p.index_select(0, source) * count).index_select(0, order)
    total = bag_sum(_signs(u, 1), relation.index_select(0, order), ptr, sent)
    return total.addcmul_(p.unsqueeze(1), _signs(own, 0))


def _torch_fwd(
    p: Tensor,
    rel_fwd: Tensor,
    rel_inv: Tensor,
    self_fwd: Tensor,
    self_inv: Tensor,
    instruction: Tensor,
    head: Tensor,
    tail: Tensor,
    tail_ptr: Tensor,
    tail_fact: Tensor,
    head_ptr: Tensor,
    head_fact: Tensor,
    pair_ptr: Tensor,
    pair_fact: Tensor,
    pair_relation: Tensor,
    fact_pair: Tensor,
    head_count: Tensor,
    tail_count: Tensor,
    node_graph: Tensor,
    seed: Tensor | None,
    dropout: float,
) -> Tensor:
    """The sums; see message_passing_parity."""
    dtype = accumulator_dtype(p, rel_fwd, rel_inv, self_fwd, self_inv, instruction)
    # Scaling the gates is scaling the result.
    p, instruction = p.to(dtype), instruction.to(dtype) * dropout_scale(dropout)
    nodes, (_, size, width) = p.shape[0], instruction.shape
    relation = pair_relation.index_select(0, fact_pair)
    walks = (
        (rel_fwd, self_fwd, head, tail_count, tail_fact, tail_ptr),
        (rel_inv, self_inv, tail, head_count, head_fact, head_ptr),
    )
    sums = [_sums(p, u.to(dtype), own.to(dtype), relation, *walk) for u, own, *walk in walks]
    out = p.new_empty((nodes, size, 2, width))
    for k in range(size):
        plus, minus = _signs(instruction[:, k], 1).index_select(0, node_graph).chunk(2, 1)
        for direction, total in enumerate(sums):
            slot = out[:, k, direction]
            torch.mul(total[:, :width], plus, out=slot)
            slot.addcmul_(total[:, width:], minus)
    if dropout > 0:
        out.masked_fill_(dropped(seed, nodes, size, width, dropout), 0.0)
    return out.flatten(1, 2)


def _torch_bwd(
    grad: Tensor,
    p: Tensor,
    rel_fwd: Tensor,
    rel_inv: Tensor,
    self_fwd: Tensor,
    self_inv: Tensor,
    instruction: Tensor,
    head: Tensor,
    tail: Tensor,
    tail_ptr: Tensor,
    tail_fact: Tensor,
    head_ptr: Tensor,
    head_fact: Tensor,
    pair_ptr: Tensor,
    pair_fact: Tensor,
    pair_relation: Tensor,
    fact_pair: Tensor,
    head_count: Tensor,
    tail_count: Tensor,
    node_graph: Tensor,
    seed: Tensor | None,
    dropout: float,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of the six float inputs; those not in output_mask come back empty."""
    inputs = (p, rel_fwd, rel_inv, self_fwd, self_inv, instruction)
    dtype = grad.dtype
    p, rel_fwd, rel_inv, self_fwd, self_inv, instruction = (x.to(dtype) for x in inputs)
    out = [x.new_empty(0) for x in inputs]
    grad = grad.unflatten(1, (-1, 2))
    scale = dropout_scale(dropout)
    if dropout > 0:
        nodes, size, _, width = grad.shape
        grad = torch.where(dropped(seed, nodes, size, width, dropout), 0.0, grad)
    relation = pair_relation.index_select(0, fact_pair)
    walks = (
        (rel_fwd, self_fwd, head, tail, tail_count, tail_fact, tail_ptr, head_fact, head_ptr),
        (rel_inv, self_inv, tail, head, head_count, head_fact, head_ptr, tail_fact, tail_ptr),
    )
    if output_mask[5]:
        sums = [
            _sums(p, u, own, relation, source, count, order, ptr)
            for u, own, source, _, count, order, ptr, *_ in walks
        ]
        out[5] = _instruction_grad(grad, sums, instruction, node_graph) * scale
    if not any(output_mask[:5]):
        return tuple(g.to(x.dtype) for g, x in zip(out, inputs, strict=True))
    nodes = torch.arange(p.shape[0], dtype=node_graph.dtype, device=p.device)
    by_relation = torch.argsort(pair_relation, stable=True).int()
    relation_ptr = segment_ptr(pair_relation[by_relation], rel_fwd.shape[0])
    for direction, (ds, walk) in enumerate(
        zip(_sum_grads(grad, instruction * scale, node_graph), walks, strict=True)
    ):
        u, own, source, target, count, _, _, source_fact, source_ptr = walk
        if output_mask[0]:
            dots = row_dots(_signs(u, 1), relation, ds, target) * count
            dp = ordered_sum(dots, source_fact, source_ptr)
            dp += row_dots(_signs(own, 0).unsqueeze(0), torch.zeros_like(nodes), ds, nodes)
            out[0] = dp if direction == 0 else out[0].add_(dp)
        if output_mask[1 + direction]:
            sent = (p.index_select(0, source) * count).index_select(0, pair_fact)
            pairs = bag_sum(ds, target.index_select(0, pair_fact), pair_ptr, sent)
            out[1 + direction] = _of_signs(bag_sum(pairs, by_relation, relation_ptr), u)
        if output_mask[3 + direction]:
            out[3 + direction] = _of_signs(product(p.unsqueeze(0), ds, dtype).squeeze(0), own)
    return tuple(g.to(x.dtype) for g, x in zip(out, inputs, strict=True))


def _sum_grads(grad: Tensor, instruction: Tensor, node_graph: Tensor) -> list[Tensor]:
    """Gradients of [S+, S-], [N, 2C] a direction, from those of the slots [N, I, 2, C]."""
    nodes, size, _, width = grad.shape
    ds = [grad.new_zeros((nodes, 2 * width)) for _ in range(2)]
    for k in range(size):
        plus, minus = _signs(instruction[:, k], 1).index_select(0, node_graph).chunk(2, 1)
        for direction in range(2):
            slot = grad[:, k, direction]
            ds[direction][:, :width].addcmul_(slot, plus)
            ds[direction][:, width:].addcmul_(slot, minus)
    return ds


def _instruction_grad(
    grad: Tensor, sums: list[Tensor], instruction: Tensor, node_graph: Tensor
) -> Tensor:
    """Gradient of the instructions: per graph the ordered sum over nodes of gradient times sum."""
    nodes, size, _, width = grad.shape
    rows = torch.arange(nodes, dtype=torch.int32, device=grad.device)
    ptr = segment_ptr(node_graph, instruction.shape[0])
    out = torch.empty_like(instruction, memory_format=torch.contiguous_format)
    for k in range(size):
        total = sums[0] * grad[:, k, 0].repeat(1, 2)
        total.addcmul_(sums[1], grad[:, k, 1].repeat(1, 2))
        out[:, k] = _of_signs(bag_sum(total, rows, ptr), instruction[:, k])
    return out


def _fake(p: Tensor, *args: object) -> Tensor:
    floats, instruction = (p, *args[: _NUM_DIFFERENTIABLE - 1]), args[_NUM_DIFFERENTIABLE - 2]
    _, size, width = instruction.shape
    return p.new_empty((p.shape[0], 2 * size, width), dtype=accumulator_dtype(*floats))


def _bwd_fake(grad: Tensor, *args: object) -> tuple[Tensor, ...]:
    inputs, mask = args[:_NUM_DIFFERENTIABLE], args[-2]
    return tuple(
        x.new_empty(x.shape) if wanted else x.new_empty(0)
        for x, wanted in zip(inputs, mask, strict=True)
    )


def _setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    *tensors, ctx.dropout, ctx.triton = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
    mask = list(ctx.needs_input_grad[:_NUM_DIFFERENTIABLE])
    grads = torch.ops.dragkit.message_passing_parity_bwd(
        grad, *ctx.saved_tensors, ctx.dropout, mask, ctx.triton
    )
    wanted = tuple(g if need else None for g, need in zip(grads, mask, strict=True))
    return wanted + (None,) * (len(ctx.needs_input_grad) - _NUM_DIFFERENTIABLE)


register(
    f"message_passing_parity_fwd({_INPUTS}, bool triton) -> Tensor",
    _torch_fwd,
    _fake,
    triton=message_passing_parity_fwd,
)
register(
    f"message_passing_parity_bwd(Tensor grad, {_INPUTS}, bool[] output_mask, bool triton) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _torch_bwd,
    _bwd_fake,
    triton=message_passing_parity_bwd,
)
register_gradient("message_passing_parity_fwd", _backward, _setup)
forbid_gradient("message_passing_parity_bwd")
