"""dragkit::relation_gate_fwd and _bwd: each value is written once, and none is kept but the output.

Autograd of the formula writes the products with both factors out before it adds them up; these are
the largest tensors of a layer. The kernels' backward does without the output as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import HAS_TRITON
from ..checks import accumulator_dtype
from ..library import empty_gradients, forbid_double_backward, register, register_gradient

if HAS_TRITON:
    from .backward import relation_gate_bwd
    from .forward import relation_gate_fwd
else:
    relation_gate_bwd = relation_gate_fwd = None

# The orders are relation_place, relation_ptr, graph_place and graph_ptr, or nothing.
_INPUTS = (
    "Tensor relation, Tensor instruction, Tensor pair_relation, Tensor pair_graph, Tensor[] grouped"
)


def _torch_fwd(
    relation: Tensor,
    instruction: Tensor,
    pair_relation: Tensor,
    pair_graph: Tensor,
    grouped: list[Tensor],
) -> Tensor:
    """See relation_gate. The orders serve the kernels' backward alone."""
    u = relation.index_select(1, pair_relation).unsqueeze(2)
    return torch.mul(u, instruction.index_select(0, pair_graph)).relu_()


def _torch_bwd(
    grad: Tensor,
    out: Tensor | None,
    relation: Tensor,
    instruction: Tensor,
    pair_relation: Tensor,
    pair_graph: Tensor,
    grouped: list[Tensor],
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    """du[d, r] = sum_k delta[d, :, k] i[:, k] over the pairs of r, di[g, k] = sum_d delta u."""
    dtype = accumulator_dtype(relation, instruction)
    delta = torch.ops.aten.threshold_backward(grad, out, 0).to(dtype)  # [2, P, I, C]
    d_relation, d_instruction = relation.new_empty(0), instruction.new_empty(0)
    if output_mask[0]:
        gate = instruction.index_select(0, pair_graph).to(dtype)
        by_pair = delta[:, :, 0] * gate[:, 0]
        for k in range(1, gate.shape[1]):
            by_pair.addcmul_(delta[:, :, k], gate[:, k])
        zeros = relation.new_zeros(relation.shape[1:], dtype=dtype)
        rows = pair_relation.long()  # index_add takes these several times as fast
        sums = [zeros.clone().index_add_(0, rows, one) for one in by_pair]
        d_relation = torch.stack(sums).to(relation.dtype)
    if output_mask[1]:
        u = relation.index_select(1, pair_relation).to(dtype)
        by_instruction = (delta[0] * u[0].unsqueeze(1)).addcmul_(delta[1], u[1].unsqueeze(1))
        zeros = instruction.new_zeros(instruction.shape, dtype=dtype)
        d_instruction = zeros.index_add_(0, pair_graph.long(), by_instruction).to(instruction.dtype)
    return d_relation, d_instruction


def _relation_gate_fake(
    relation: Tensor, instruction: Tensor, pair_relation: Tensor, *rest: object
) -> Tensor:
    return relation.new_empty(2, pair_relation.shape[0], *instruction.shape[1:])


def _relation_gate_bwd_fake(
    grad: Tensor, out: Tensor | None, relation: Tensor, instruction: Tensor, *rest: object
) -> tuple[Tensor, ...]:
    return empty_gradients((relation, instruction), rest[-2])


def _setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    *tensors, grouped, ctx.triton = inputs
    ctx.save_for_backward(None if ctx.triton else output, *tensors, *grouped)


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor]:
    mask = list(ctx.needs_input_grad[:2])
    out, relation, instruction, pair_relation, pair_graph, *grouped = ctx.saved_tensors
    inputs = (relation, instruction, pair_relation, pair_graph, grouped)
    return torch.ops.dragkit.relation_gate_bwd(grad, out, *inputs, mask, ctx.triton)


register(
    f"relation_gate_fwd({_INPUTS}, bool triton) -> Tensor",
    _torch_fwd,
    _relation_gate_fake,
    triton=relation_gate_fwd,
)
register(
    f"relation_gate_bwd(Tensor grad, Tensor? out, {_INPUTS}, bool[] output_mask, bool triton) "
    "-> (Tensor, Tensor)",
    _torch_bwd,
    _relation_gate_bwd_fake,
    triton=relation_gate_bwd,
)
register_gradient("relation_gate_fwd", _backward, _setup)
forbid_double_backward("relation_gate_bwd")
