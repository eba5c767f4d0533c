"""dragkit::message_passing_fwd and _bwd. `index` holds the fields of a FactIndex."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import HAS_TRITON
from ..library import empty_gradients, forbid_double_backward, register, register_gradient
from . import torch_impl

if HAS_TRITON:
    from .backward import message_passing_bwd
    from .forward import message_passing_fwd
else:
    message_passing_bwd = message_passing_fwd = None

_INPUTS = (
    "Tensor h, Tensor p, Tensor table_fwd, Tensor table_inv, Tensor self_table, Tensor weight, "
    "Tensor bias, Tensor[] index, Tensor node_graph"
)
_NUM_DIFFERENTIABLE = 7


def _fwd_fake(h: Tensor, *args: object) -> Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _bwd_fake(grad: Tensor, h_out: Tensor, *args: object) -> tuple[Tensor, ...]:
    return empty_gradients(args[:_NUM_DIFFERENTIABLE], args[-2])


def _setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    *floats, index, node_graph, ctx.triton = inputs
    # The output stands for the relu's input: it is positive where the gradient passes.
    ctx.save_for_backward(output, *floats, node_graph, *index)


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor, ...]:
    mask = list(ctx.needs_input_grad[:_NUM_DIFFERENTIABLE])
    out, *floats = ctx.saved_tensors[: 1 + _NUM_DIFFERENTIABLE]
    node_graph, *index = ctx.saved_tensors[1 + _NUM_DIFFERENTIABLE :]
    return torch.ops.dragkit.message_passing_bwd(
        grad, out, *floats, index, node_graph, mask, ctx.triton
    )


register(
    f"message_passing_fwd({_INPUTS}, bool triton) -> Tensor",
    torch_impl.message_passing_fwd,
    _fwd_fake,
    triton=message_passing_fwd,
)
register(
    f"message_passing_bwd(Tensor grad, Tensor h_out, {_INPUTS}, bool[] output_mask, bool triton) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    torch_impl.message_passing_bwd,
    _bwd_fake,
    triton=message_passing_bwd,
)
register_gradient("message_passing_fwd", _backward, _setup)
forbid_double_backward("message_passing_bwd")
