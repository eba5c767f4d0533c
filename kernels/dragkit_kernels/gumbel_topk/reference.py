"""The differentiable draw by its definition: plain PyTorch with autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..segments import padded_rows, segment_ids

# Logits beyond +-MAX_LOGIT are certain. The clamp keeps infinities out of the bisection.
MAX_LOGIT = 1e4


class FactSelection(NamedTuple):
    """At most k selected facts of each question.

    Attributes:
        index: int32 [B, k] facts of the pack, best key first, -1 for an empty slot.
        gate: float [B, k] 1 for a selected fact, 0 for an empty slot. It carries the gradient.
        count: int32 [B] number of selected facts.
        soft: float [E] relaxed choice of every fact, with the same derivative as the gate. Padding
            rows after the last question have 0.
    """

    index: Tensor
    gate: Tensor
    count: Tensor
    soft: Tensor


def select_largest(
    key: Tensor, bound: float | None, fact_ptr: Tensor, k: int, max_facts: int
) -> tuple[Tensor, Tensor]:
    """Selects the k largest keys above the bound, at least one per question with facts if k > 0.

    Keys are compared in float32 and ties go to the lowest fact. The 64-bit code (sortable bits of
    the key, then the reversed fact number) makes every code unique, so that topk has no ties.

    Args:
        key: float [E].
        bound: keys must exceed it. None selects without a bound.
        fact_ptr: int [B+1].
        k: maximum number of facts per question.
        max_facts: upper bound on the facts of a question.

    Returns:
        index int32 [B, k] with -1 for empty slots, count int32 [B].
    """
    num_facts = key.shape[0]
    # Adding 0.0 turns -0.0 into 0.0, so that both have the same bits.
    bits = (key.detach().float() + 0.0).view(torch.int32)
    bits = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    reversed_fact = 0x7FFFFFFF - torch.arange(num_facts, device=key.device)
    lowest = torch.iinfo(torch.int64).min
    code = F.pad((bits << 32) | reversed_fact, (0, 1), value=lowest)
    padded = code[padded_rows(fact_ptr, num_facts, max_facts)]
    best = padded.topk(min(k, max_facts), dim=1).values
    selected = best != lowest
    fact = 0x7FFFFFFF - (best & 0x7FFFFFFF)
    if bound is not None:
        first = torch.arange(best.shape[1], device=key.device) == 0
        above = F.pad(key.detach() > bound, (0, 1))[torch.where(selected, fact, num_facts)]
        selected = selected & (above | first)
    index = torch.where(selected, fact, -1).to(torch.int32)
    index = F.pad(index, (0, k - index.shape[1]), value=-1)
    return index, selected.sum(1, dtype=torch.int32)


def exact_k_threshold(x: Tensor, fact_ptr: Tensor, k: int, max_facts: int) -> Tensor:
    """[B] nu with sum_i sigmoid(x_i - nu) = k over each question, by bisection.

    nu is -inf for a question of at most k facts, which selects all of them, and inf for k = 0.
    """
    size = fact_ptr[1:] - fact_ptr[:-1]
    low = x.new_full(size.shape, -2 * MAX_LOGIT)
    high = -low
    rows = padded_rows(fact_ptr, x.shape[0], max_facts)
    padded = F.pad(x, (0, 1), value=float("-inf"))[rows]  # sigmoid(-inf - nu) = 0
    # 64 and 42 bisections exceed the resolution of the dtype.
    for _ in range(64 if x.dtype == torch.float64 else 42):
        middle = (low + high) / 2
        too_many = torch.sigmoid(padded - middle.unsqueeze(1)).sum(1) > k
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    nu = ((low + high) / 2).masked_fill(size <= k, float("-inf"))
    return nu if k > 0 else torch.full_like(nu, float("inf"))


def soft_choice(x: Tensor, nu: Tensor, fact_ptr: Tensor, exact_k: bool) -> Tensor:
    """[E] s_i = sigmoid(x_i - nu) with nu of the fact's question, and 0 for padding rows.

    With exact_k, nu depends on x such that sum(s) = k, so ds = d dx - d (d . dx) / sum(d) with
    d = s (1 - s).

    Args:
        x: float [E], finite.
        nu: float [B].
        fact_ptr: int [B+1].
        exact_k: whether nu depends on x.
    """
    segment = segment_ids(fact_ptr, x.shape[0])
    nu = F.pad(nu, (0, 1), value=float("inf"))
    if exact_k:
        soft = torch.sigmoid(x - nu.index_select(0, segment))
        slope = (soft * (1 - soft)).detach()
        total = torch.zeros_like(nu).index_add(0, segment, soft)
        slope_sum = torch.zeros_like(nu).index_add(0, segment, slope).clamp(min=1e-30)
        # Keep the bisected value of nu and add its derivative d_i / sum(d).
        nu = nu + (total - total.detach()) / slope_sum
    return torch.sigmoid(x - nu.index_select(0, segment))


def hard_gate(soft: Tensor, index: Tensor) -> Tensor:
    """[B, k] exactly 1 for selected facts, with the gradient of `soft`, and 0 for empty slots."""
    selected = index >= 0
    fact = torch.where(selected, index.long(), soft.shape[0])
    picked = F.pad(soft, (0, 1))[fact]
    return selected.to(soft.dtype) + (picked - picked.detach())


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
    """See gumbel_topk. The noise is an argument, so that implementations can be compared.

    `bound` is the value that keys must exceed with "bernoulli". Without noise, and with the logit
    of a threshold as bound, this is top_facts.
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
    """Selects by `key`, with the relaxed choice of `x`. Both are float [E]."""
    x = x.clamp(-MAX_LOGIT, MAX_LOGIT)
    if exact_k:
        nu = exact_k_threshold(x.detach(), fact_ptr, k, max_facts)
    else:
        nu = x.new_zeros(fact_ptr.shape[0] - 1)
    soft = soft_choice(x, nu, fact_ptr, exact_k)
    index, count = select_largest(key, None if exact_k else bound, fact_ptr, k, max_facts)
    return FactSelection(index, hard_gate(soft, index), count, soft)
