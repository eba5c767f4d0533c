"""relation_gate by its formula: plain PyTorch, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def relation_gate_ref(
    relation: Tensor, instruction: Tensor, pair_relation: Tensor, pair_graph: Tensor
) -> Tensor:
    """c[d, r, k] = relu(u[d, relation_r] * i[graph_r, k])."""
    u = relation.index_select(1, pair_relation).unsqueeze(2)
    return torch.relu(u * instruction.index_select(0, pair_graph))
