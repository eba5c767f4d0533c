"""dragkit::relation_gate_fwd and _bwd.

`grouped` holds pairs_by_relation (perm, ptr) and pairs_by_graph (perm, ptr), or nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import HAS_TRITON
from ..library import empty_gradients, forbid_double_backward, register, register_gradient
from . import torch_impl

if HAS_TRITON:
    from .backward import relation_gate_bwd
    from .forward import relation_gate_fwd
else:
    relation_gate_bwd = relation_gate_fwd = None

_INPUTS = (
    "Tensor relation, Tensor instruction, Tensor pair_relation, Tensor pair_graph, Tensor[] grouped"
)


def _fwd_fake(
    relation: Tensor, instruction: Tensor, pair_relation: Tensor, *rest: object
) -> Tensor:
    return relation.new_empty(2, pair_relation.shape[0], *instruction.shape[1:])


def _bwd_fake(
    grad: Tensor, out: Tensor | None, relation: Tensor, instruction: Tensor, *rest: object
) -> tuple[Tensor, ...]:
    return empty_gradients((relation, instruction), rest[-2])


def _setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    *tensors, grouped, ctx.triton = inputs
    # The kernels recompute from the two factors where the output is positive.
    ctx.save_for_backward(None if ctx.triton else output, *tensors, *grouped)


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor]:
    mask = list(ctx.needs_input_grad[:2])
    out, relation, instruction, pair_relation, pair_graph, *grouped = ctx.saved_tensors
    inputs = (relation, instruction, pair_relation, pair_graph, grouped)
    return torch.ops.dragkit.relation_gate_bwd(grad, out, *inputs, mask, ctx.triton)


register(
    f"relation_gate_fwd({_INPUTS}, bool triton) -> Tensor",
    torch_impl.relation_gate_fwd,
    _fwd_fake,
    triton=relation_gate_fwd,
)
register(
    f"relation_gate_bwd(Tensor grad, Tensor? out, {_INPUTS}, bool[] output_mask, bool triton) "
    "-> (Tensor, Tensor)",
    torch_impl.relation_gate_bwd,
    _bwd_fake,
    triton=relation_gate_bwd,
)
register_gradient("relation_gate_fwd", _backward, _setup)
forbid_double_backward("relation_gate_bwd")
