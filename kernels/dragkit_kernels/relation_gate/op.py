"""dragkit::relation_gate_fwd and _bwd: each value is written once, and none is kept but the output.

Autograd of the formula writes the products with both factors out before it adds them up; these are
the largest tensors of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..library import forbid_gradient, register, register_gradient

_INPUTS = "Tensor relation, Tensor instruction, Tensor pair_relation, Tensor pair_graph"


def relation_gate_fwd(
    relation: Tensor, instruction: Tensor, pair_relation: Tensor, pair_graph: Tensor
) -> Tensor:
    """See relation_gate."""
    u = relation.index_select(1, pair_relation).unsqueeze(2)
    return torch.mul(u, instruction.index_select(0, pair_graph)).relu_()


def relation_gate_bwd(
    grad: Tensor,
    out: Tensor,
    relation: Tensor,
    instruction: Tensor,
    pair_relation: Tensor,
    pair_graph: Tensor,
) -> tuple[Tensor, Tensor]:
    """du[d, r] = sum_k delta[d, :, k] i[:, k] over the pairs of r, di[g, k] = sum_d delta u."""
    delta = torch.ops.aten.threshold_backward(grad, out, 0)  # [2, P, I, C]
    u = relation.index_select(1, pair_relation)
    gate = instruction.index_select(0, pair_graph)
    by_pair = delta[:, :, 0] * gate[:, 0]
    for k in range(1, gate.shape[1]):
        by_pair.addcmul_(delta[:, :, k], gate[:, k])
    by_instruction = (delta[0] * u[0].unsqueeze(1)).addcmul_(delta[1], u[1].unsqueeze(1))
    d_relation = torch.stack(
        [
            relation.new_zeros(relation.shape[1:]).index_add_(0, pair_relation, rows)
            for rows in by_pair
        ]
    )
    d_instruction = torch.zeros_like(instruction, memory_format=torch.contiguous_format)
    return d_relation, d_instruction.index_add_(0, pair_graph, by_instruction)


def _relation_gate_fake(
    relation: Tensor, instruction: Tensor, pair_relation: Tensor, pair_graph: Tensor
) -> Tensor:
    return relation.new_empty(2, pair_relation.shape[0], *instruction.shape[1:])


def _relation_gate_bwd_fake(
    grad: Tensor, out: Tensor, relation: Tensor, instruction: Tensor, *pairs: Tensor
) -> tuple[Tensor, Tensor]:
    return relation.new_empty(relation.shape), instruction.new_empty(instruction.shape)


def _setup(ctx: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs)


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.dragkit.relation_gate_bwd(grad, *ctx.saved_tensors), None, None)


register(f"relation_gate_fwd({_INPUTS}) -> Tensor", relation_gate_fwd, _relation_gate_fake)
register(
    f"relation_gate_bwd(Tensor grad, Tensor out, {_INPUTS}) -> (Tensor, Tensor)",
    relation_gate_bwd,
    _relation_gate_bwd_fake,
)
register_gradient("relation_gate_fwd", _backward, _setup)
forbid_gradient("relation_gate_bwd")
