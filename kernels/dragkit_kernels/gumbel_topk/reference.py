"""Differentiable choice of facts: plain PyTorch, gradients by autograd, no loop over questions."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..segments import padded_rows, segment_ids

# Logits beyond this are certain; it keeps infinities out of the bisection.
MAX_LOGIT = 1e4


class FactSelection(NamedTuple):
    """At most k facts of each question.

    Attributes:
        index: int32 [B, k] facts of the pack, best key first, -1 for an empty slot.
        gate: float [B, k] 1 for a kept slot, 0 for an empty one; carries the gradient.
        count: int32 [B] kept facts.
        soft: float [E] relaxed choice of every fact, with the same derivative as the gate; 0 for
            rows after the last question (padding).
    """

    index: Tensor
    gate: Tensor
    count: Tensor
    soft: Tensor


def select_largest(
    key: Tensor, bound: float | None, fact_ptr: Tensor, k: int, max_facts: int
) -> tuple[Tensor, Tensor]:
    """The k largest keys of each question, of those above the bound; at least one if k allows.

    Keys are compared in float32; equal keys are taken by lowest fact. A 64-bit code (sortable bits
    of the key, then the fact counted backwards) makes any top-k routine exact about ties.

    Args:
        key: float [E]; bound: a number, or None for no bound.
        fact_ptr: int [B+1].
        k: slots; max_facts: at least the facts of every question.

    Returns:
        index int32 [B, k] with -1 for empty slots, count int32 [B].
    """
    num_facts = key.shape[0]
    # Adding 0.0 makes -0.0 and 0.0 the same bits.
    bits = (key.detach().float() + 0.0).view(torch.int32)
    bits = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    reversed_fact = 0x7FFFFFFF - torch.arange(num_facts, device=key.device)
    lowest = torch.iinfo(torch.int64).min
    code = F.pad((bits << 32) | reversed_fact, (0, 1), value=lowest)
    padded = code[padded_rows(fact_ptr, num_facts, max_facts)]
    best = padded.topk(min(k, max_facts), dim=1).values
    kept = best != lowest
    fact = 0x7FFFFFFF - (best & 0x7FFFFFFF)
    if bound is not None:
        first = torch.arange(best.shape[1], device=key.device) == 0
        above = F.pad(key.detach() > bound, (0, 1))[torch.where(kept, fact, num_facts)]
        kept = kept & (above | first)
    index = torch.where(kept, fact, -1).to(torch.int32)
    index = F.pad(index, (0, k - index.shape[1]), value=-1)
    return index, kept.sum(1, dtype=torch.int32)


def exact_k_threshold(x: Tensor, fact_ptr: Tensor, k: int, max_facts: int) -> Tensor:
    """nu [B] with sum_i sigmoid(x_i - nu) = k over each question, by bisection.

    A question of at most k facts keeps them all: the limit nu = -inf. For k = 0 nu is inf.
    """
    size = fact_ptr[1:] - fact_ptr[:-1]
    low = x.new_full(size.shape, -2 * MAX_LOGIT)
    high = -low
    rows = padded_rows(fact_ptr, x.shape[0], max_facts)
    padded = F.pad(x, (0, 1), value=float("-inf"))[rows]  # sigmoid(-inf - nu) = 0
    # Halvings of that bracket: beyond the resolution of the type.
    for _ in range(64 if x.dtype == torch.float64 else 42):
        middle = (low + high) / 2
        too_many = torch.sigmoid(padded - middle.unsqueeze(1)).sum(1) > k
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    nu = ((low + high) / 2).masked_fill(size <= k, float("-inf"))
    return nu if k > 0 else torch.full_like(nu, float("inf"))


def soft_choice(x: Tensor, nu: Tensor, fact_ptr: Tensor, exact_k: bool) -> Tensor:
    """s_i = sigmoid(x_i - nu), nu of i's question; 0 after the last question.

    In a budget nu moves with x, so that the s of a question keep their sum:
    ds = d g - d (d . g) / sum(d) with d = s (1 - s).

    Args:
        x: float [E], finite; nu: [B]; fact_ptr: int [B+1].
    """
    segment = segment_ids(fact_ptr, x.shape[0])
    nu = F.pad(nu, (0, 1), value=float("inf"))
    if exact_k:
        soft = torch.sigmoid(x - nu.index_select(0, segment))
        slope = (soft * (1 - soft)).detach()
        total = torch.zeros_like(nu).index_add(0, segment, soft)
        slope_sum = torch.zeros_like(nu).index_add(0, segment, slope).clamp(min=1e-30)
        # The value of nu stays as bisected; only its derivative d_i / sum(d) is added.
        nu = nu + (total - total.detach()) / slope_sum
    return torch.sigmoid(x - nu.index_select(0, segment))


def hard_gate(soft: Tensor, index: Tensor) -> Tensor:
    """Gate [B, k]: exactly 1 at kept slots and 0 elsewhere, with the gradient of `soft` there."""
    kept = index >= 0
    fact = torch.where(kept, index.long(), soft.shape[0])
    picked = F.pad(soft, (0, 1))[fact]
    return kept.to(soft.dtype) + (picked - picked.detach())


def perturb_logits(
    logits: Tensor, noise: Tensor | None, temperature: float, estimator: str
) -> tuple[Tensor, Tensor]:
    """(x, key) float [E]: key = l + noise, and x = key / T with binary_concrete, else l."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    key = logits if noise is None else logits + noise
    return key / temperature if estimator == "binary_concrete" else logits, key


def gumbel_topk_ref(
    logits: Tensor,
    fact_ptr: Tensor,
    k: int,
    *,
    temperature: float,
    noise: Tensor | None,
    mode: str,
    estimator: str,
    max_facts: int,
    bound: float = 0.0,
) -> FactSelection:
    """See gumbel_topk. The noise is an argument, so that any two implementations can be compared.

    `bound` is what a key must exceed in bernoulli mode. Without noise, and with the logit of a
    threshold as the bound, this is top_facts.
    """
    x, key = perturb_logits(logits, noise, temperature, estimator)
    return select_facts(
        x, key, fact_ptr, k, max_facts=max_facts, bound=bound, exact_k=mode == "exact_k"
    )


def select_facts(
    x: Tensor,
    key: Tensor,
    fact_ptr: Tensor,
    k: int,
    *,
    max_facts: int,
    bound: float,
    exact_k: bool,
) -> FactSelection:
    """The k largest keys of each question and the relaxed choice of x, float [E] both."""
    x = x.clamp(-MAX_LOGIT, MAX_LOGIT)
    if exact_k:
        nu = exact_k_threshold(x.detach(), fact_ptr, k, max_facts)
    else:
        nu = x.new_zeros(fact_ptr.shape[0] - 1)
    soft = soft_choice(x, nu, fact_ptr, exact_k)
    index, count = select_largest(key, None if exact_k else bound, fact_ptr, k, max_facts)
    return FactSelection(index, hard_gate(soft, index), count, soft)
