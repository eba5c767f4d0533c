"""dragkit::budget_threshold: the bisection as one opaque op, so that compile does not unroll it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..library import forbid_gradient, register
from ..segments import padded_rows

# Halvings of a bracket as wide as the spread of the logits: beyond float32 resolution.
_BISECTIONS = 40


def budget_threshold(x: Tensor, fact_ptr: Tensor, k: int, max_facts: int) -> Tensor:
    """nu [B] with sum_i sigmoid(x_i - nu) = k over each question of more than k facts.

    Where a question has at most k facts there is no such nu and the value is meaningless.
    """
    if max_facts == 0:
        return x.new_zeros(fact_ptr.shape[0] - 1)
    rows = padded_rows(fact_ptr, x.shape[0], max_facts)
    inner = F.pad(x, (0, 1))[rows]
    padded = F.pad(x, (0, 1), value=float("-inf"))[rows]  # sigmoid(-inf - nu) = 0
    # At these outer marks every p is on one side of k / size.
    size = (fact_ptr[1:] - fact_ptr[:-1]).to(x.dtype)
    spread = torch.log((size / k - 1).clamp(min=1 / k))
    low, high = inner.amin(1) + spread - 1.0, inner.amax(1) + spread + 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        over = torch.sigmoid(padded - middle.unsqueeze(1)).sum(1) > k
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return (low + high) / 2


def _budget_threshold_fake(x: Tensor, fact_ptr: Tensor, k: int, max_facts: int) -> Tensor:
    return x.new_empty(fact_ptr.shape[0] - 1)


register(
    "budget_threshold(Tensor x, Tensor fact_ptr, SymInt k, SymInt max_facts) -> Tensor",
    budget_threshold,
    _budget_threshold_fake,
)
forbid_gradient("budget_threshold")
