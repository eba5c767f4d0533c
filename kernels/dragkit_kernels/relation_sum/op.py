"""dragkit::relation_sum_fwd and _bwd. `index` holds the fields of a FactIndex."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import HAS_TRITON
from ..library import forbid_double_backward, register, register_gradient
from ..orders import FactIndex
from . import torch_impl

if HAS_TRITON:
    from .backward import relation_sum_bwd
    from .forward import relation_sum_fwd
else:
    relation_sum_bwd = relation_sum_fwd = None


def _fwd_fake(table: Tensor, index: list[Tensor], triton: bool) -> Tensor:
    return table.new_empty(FactIndex(*index).num_nodes, table.shape[1])


def _bwd_fake(grad: Tensor, index: list[Tensor], triton: bool) -> Tensor:
    return grad.new_empty(FactIndex(*index).num_pairs, grad.shape[1])


def _setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    _, index, ctx.triton = inputs
    ctx.save_for_backward(*index)


def _backward(ctx: object, grad: Tensor) -> Tensor:
    return torch.ops.dragkit.relation_sum_bwd(grad, list(ctx.saved_tensors), ctx.triton)


register(
    "relation_sum_fwd(Tensor table, Tensor[] index, bool triton) -> Tensor",
    torch_impl.relation_sum_fwd,
    _fwd_fake,
    triton=relation_sum_fwd,
)
register(
    "relation_sum_bwd(Tensor grad, Tensor[] index, bool triton) -> Tensor",
    torch_impl.relation_sum_bwd,
    _bwd_fake,
    triton=relation_sum_bwd,
)
register_gradient("relation_sum_fwd", _backward, _setup)
forbid_double_backward("relation_sum_bwd")
