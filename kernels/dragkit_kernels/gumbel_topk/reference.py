"""Differentiable choice of facts: plain PyTorch, gradients by autograd, no loop over questions."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..segments import padded_rows, segment_ids

# Logits beyond this are certain; it keeps infinities out of the bisection.
_CERTAIN = 1e4


class GumbelTopK(NamedTuple):
    """The facts kept for each question.

    Attributes:
        index: int32 [B, k] facts of the pack, best key first, -1 for an empty slot.
        gate: float [B, k] 1 for a kept slot, 0 for an empty one; carries the gradient.
        count: int32 [B] kept facts.
        soft: float [E] relaxed choice of every fact, with the same derivative as the gate.
    """

    index: Tensor
    gate: Tensor
    count: Tensor
    soft: Tensor


def select_largest(
    key: Tensor, fires: Tensor | None, fact_ptr: Tensor, k: int, max_facts: int
) -> tuple[Tensor, Tensor]:
    """The k largest keys of each question, of those that fire; at least one if k allows.

    Keys are compared in float32; equal keys are taken by lowest fact. A 64-bit code (sortable bits
    of the key, then the fact counted backwards) makes any top-k routine exact about ties.

    Args:
        key: float [E]; fires: bool [E] or None for all.
        fact_ptr: int [B+1].
        k: slots; max_facts: at least the facts of every question.

    Returns:
        index int32 [B, k] with -1 for empty slots, count int32 [B].
    """
    num_facts = key.shape[0]
    # Adding 0.0 makes -0.0 and 0.0 the same bits.
    bits = (key.detach().float() + 0.0).view(torch.int32)
    bits = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    backwards = 0x7FFFFFFF - torch.arange(num_facts, device=key.device)
    lowest = torch.iinfo(torch.int64).min
    code = F.pad((bits << 32) | backwards, (0, 1), value=lowest)
    padded = code[padded_rows(fact_ptr, num_facts, max_facts)]
    best = padded.topk(min(k, max_facts), dim=1).values
    kept = best != lowest
    fact = 0x7FFFFFFF - (best & 0x7FFFFFFF)
    if fires is not None:
        first = torch.arange(best.shape[1], device=key.device) == 0
        fired = F.pad(fires, (0, 1))[torch.where(kept, fact, num_facts)]
        kept = kept & (fired | first)
    index = torch.where(kept, fact, -1).to(torch.int32)
    index = F.pad(index, (0, k - index.shape[1]), value=-1)
    return index, kept.sum(1, dtype=torch.int32)


def budget_probability(x: Tensor, fact_ptr: Tensor, k: int, max_facts: int) -> Tensor:
    """p_i = sigmoid(x_i - nu) with one nu per question such that its p sum to k.

    nu is found by bisection and differentiated implicitly: dx = d g - d (d . g) / sum(d) with
    d = p (1 - p). A question of at most k facts keeps them all: p = 1 and no gradient, the limit
    nu -> -inf. For k = 0 all p are 0.

    Args:
        x: float [E]; fact_ptr: int [B+1]; k: budget; max_facts: at least the facts of every
            question.

    Returns:
        [E] with the dtype of `x`.
    """
    x = x.clamp(-_CERTAIN, _CERTAIN)
    if k == 0:
        return torch.sigmoid(x) * 0.0
    num_facts, segments = x.shape[0], fact_ptr.shape[0]
    size = fact_ptr[1:] - fact_ptr[:-1]
    with torch.no_grad():
        nu = torch.ops.dragkit.budget_threshold(x, fact_ptr, k, max_facts)
        nu = F.pad(nu, (0, 1))  # for rows after the last question
    segment = segment_ids(fact_ptr, num_facts)
    fixed = torch.sigmoid(x - nu.index_select(0, segment))
    slope = (fixed * (1 - fixed)).detach()
    total = x.new_zeros(segments).index_add(0, segment, fixed)
    steepness = x.new_zeros(segments).index_add(0, segment, slope).clamp(min=1e-30)
    # The value of nu stays as bisected; only its derivative d_i / sum(d) is added.
    nu = nu + (total - total.detach()) / steepness
    p = torch.sigmoid(x - nu.index_select(0, segment))
    whole = F.pad(size <= k, (0, 1)).index_select(0, segment)
    return torch.where(whole, torch.ones_like(p), p)


def straight_through(soft: Tensor, index: Tensor) -> Tensor:
    """Gate [B, k]: exactly 1 at kept slots and 0 elsewhere, with the gradient of `soft` there."""
    kept = index >= 0
    place = torch.where(kept, index.long(), soft.shape[0])
    picked = F.pad(soft, (0, 1))[place]
    return kept.to(soft.dtype) + (picked - picked.detach())


def gumbel_topk_ref(
    logits: Tensor,
    fact_ptr: Tensor,
    k: int,
    *,
    temperature: float,
    noise: Tensor,
    mode: str,
    estimator: str,
    max_facts: int,
) -> GumbelTopK:
    """See gumbel_topk; the noise is an argument so that any two implementations can be compared."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    key = logits + noise
    x = logits if estimator == "mean" else key / temperature
    if mode == "budget":
        fires = None
        soft = budget_probability(x, fact_ptr, k, max_facts)
    else:
        fires = key > 0
        soft = torch.sigmoid(x)
    index, count = select_largest(key, fires, fact_ptr, k, max_facts)
    return GumbelTopK(index, straight_through(soft, index), count, soft)
