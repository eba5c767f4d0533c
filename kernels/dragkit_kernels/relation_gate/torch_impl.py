"""relation_gate in PyTorch with its gradient written out.

Autograd of the formula would store the products with both factors before it sums them. These are
the largest tensors of a layer. Here each product is added up as it is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulator_dtype


def relation_gate_fwd(
    relation: Tensor,
    instruction: Tensor,
    pair_relation: Tensor,
    pair_graph: Tensor,
    grouped: list[Tensor],
) -> Tensor:
    """The gated rows (see `relation_gate`). Only the kernels' backward reads `grouped`."""
    u = relation.index_select(1, pair_relation).unsqueeze(2)
    return torch.mul(u, instruction.index_select(0, pair_graph)).relu_()


def relation_gate_bwd(
    grad: Tensor,
    out: Tensor | None,
    relation: Tensor,
    instruction: Tensor,
    pair_relation: Tensor,
    pair_graph: Tensor,
    grouped: list[Tensor],
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    """du[d, q] and di[g, k] (see `relation_gate`). Those outside `output_mask` are empty, [0]."""
    dtype = accumulator_dtype(relation, instruction)
    delta = torch.ops.aten.threshold_backward(grad, out, 0).to(dtype)  # [2, P, I, C]
    d_relation, d_instruction = relation.new_empty(0), instruction.new_empty(0)
    if output_mask[0]:
        gate = instruction.index_select(0, pair_graph).to(dtype)
        by_pair = delta[:, :, 0] * gate[:, 0]
        for k in range(1, gate.shape[1]):
            by_pair.addcmul_(delta[:, :, k], gate[:, k])
        zeros = relation.new_zeros(relation.shape[1:], dtype=dtype)
        rows = pair_relation.long()  # index_add is several times as fast with int64 rows
        sums = [zeros.clone().index_add_(0, rows, direction) for direction in by_pair]
        d_relation = torch.stack(sums).to(relation.dtype)
    if output_mask[1]:
        u = relation.index_select(1, pair_relation).to(dtype)
        by_instruction = (delta[0] * u[0].unsqueeze(1)).addcmul_(delta[1], u[1].unsqueeze(1))
        zeros = instruction.new_zeros(instruction.shape, dtype=dtype)
        d_instruction = zeros.index_add_(0, pair_graph.long(), by_instruction).to(instruction.dtype)
    return d_relation, d_instruction
