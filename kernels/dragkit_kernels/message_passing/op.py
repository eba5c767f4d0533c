"""dragkit::message_passing_* and relation_sum_*: one opaque op forward, one backward.

`index` are the fields of a FactIndex.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import HAS_TRITON
from ..library import (
    empty_gradients,
    forbid_double_backward,
    register,
    register_gradient,
    wanted_gradients,
)
from ..orders import FactIndex
from . import torch_impl

if HAS_TRITON:
    from .backward import message_passing_bwd, relation_sum_bwd
    from .forward import message_passing_fwd, relation_sum_fwd
else:
    message_passing_bwd = message_passing_fwd = relation_sum_bwd = relation_sum_fwd = None

_INPUTS = (
    "Tensor h, Tensor p, Tensor table_fwd, Tensor table_inv, Tensor self_table, Tensor weight, "
    "Tensor bias, Tensor[] index, Tensor node_graph"
)
_NUM_DIFFERENTIABLE = 7


def _message_passing_fake(h: Tensor, *args: object) -> Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _message_passing_bwd_fake(grad: Tensor, h_out: Tensor, *args: object) -> tuple[Tensor, ...]:
    return empty_gradients(args[:_NUM_DIFFERENTIABLE], args[-2])


def _message_passing_setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    *floats, index, node_graph, ctx.triton = inputs
    ctx.save_for_backward(output, *floats, node_graph, *index)


def _message_passing_backward(ctx: object, grad: Tensor) -> tuple[object, ...]:
    mask = list(ctx.needs_input_grad[:_NUM_DIFFERENTIABLE])
    out, *floats = ctx.saved_tensors[: 1 + _NUM_DIFFERENTIABLE]
    node_graph, *index = ctx.saved_tensors[1 + _NUM_DIFFERENTIABLE :]
    grads = torch.ops.dragkit.message_passing_bwd(
        grad, out, *floats, index, node_graph, mask, ctx.triton
    )
    # A list of tensors takes a list of gradients.
    return *wanted_gradients(grads, mask), [None] * len(index), None, None


def _relation_sum_fake(table: Tensor, index: list[Tensor], triton: bool) -> Tensor:
    return table.new_empty(FactIndex(*index).num_nodes, table.shape[1])


def _relation_sum_bwd_fake(grad: Tensor, index: list[Tensor], triton: bool) -> Tensor:
    return grad.new_empty(FactIndex(*index).num_pairs, grad.shape[1])


def _relation_sum_setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    _, index, ctx.triton = inputs
    ctx.save_for_backward(*index)


def _relation_sum_backward(ctx: object, grad: Tensor) -> tuple[object, ...]:
    index = list(ctx.saved_tensors)
    d_table = torch.ops.dragkit.relation_sum_bwd(grad, index, ctx.triton)
    return d_table, [None] * len(index), None


register(
    f"message_passing_fwd({_INPUTS}, bool triton) -> Tensor",
    torch_impl.message_passing_fwd,
    _message_passing_fake,
    triton=message_passing_fwd,
)
register(
    f"message_passing_bwd(Tensor grad, Tensor h_out, {_INPUTS}, bool[] output_mask, bool triton) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    torch_impl.message_passing_bwd,
    _message_passing_bwd_fake,
    triton=message_passing_bwd,
)
register_gradient("message_passing_fwd", _message_passing_backward, _message_passing_setup)
register(
    "relation_sum_fwd(Tensor table, Tensor[] index, bool triton) -> Tensor",
    torch_impl.relation_sum_fwd,
    _relation_sum_fake,
    triton=relation_sum_fwd,
)
register(
    "relation_sum_bwd(Tensor grad, Tensor[] index, bool triton) -> Tensor",
    torch_impl.relation_sum_bwd,
    _relation_sum_bwd_fake,
    triton=relation_sum_bwd,
)
register_gradient("relation_sum_fwd", _relation_sum_backward, _relation_sum_setup)
forbid_double_backward("message_passing_bwd")
forbid_double_backward("relation_sum_bwd")
