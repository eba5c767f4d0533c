"""dragkit::gumbel_topk_fwd and _bwd: one opaque op each way, noise drawn inside both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import HAS_TRITON
from ..checks import accumulator_dtype
from ..library import forbid_gradient, register, register_gradient
from ..noise import logistic_noise
from ..segments import segment_ids
from .reference import CERTAIN, choose

if HAS_TRITON:
    from .backward import gumbel_topk_bwd
    from .forward import gumbel_topk_fwd
else:
    gumbel_topk_fwd = gumbel_topk_bwd = None


def _given_or_drawn(
    noise: Tensor | None,
    seed: Tensor | None,
    question_key: Tensor | None,
    fact_ptr: Tensor,
    num_facts: int,
) -> Tensor | None:
    if seed is None:
        return noise
    return logistic_noise(seed, question_key, fact_ptr, num_facts=num_facts, backend="torch")


def _torch_fwd(
    logits: Tensor,
    fact_ptr: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    question_key: Tensor | None,
    k: int,
    max_facts: int,
    bound: float,
    temperature: float,
    budget: bool,
    concrete: bool,
) -> tuple[Tensor, ...]:
    """The reference, with the slot of every fact (-1 for none) and nu (inf for padding)."""
    num_facts = logits.shape[0]
    drawn, nu = choose(
        logits,
        fact_ptr,
        k,
        temperature=temperature,
        noise=_given_or_drawn(noise, seed, question_key, fact_ptr, num_facts),
        budget=budget,
        concrete=concrete,
        max_facts=max_facts,
        bound=bound,
    )
    place = torch.where(drawn.index >= 0, drawn.index, num_facts).long()
    column = torch.arange(k, dtype=torch.int32, device=place.device).expand(place.shape)
    slot = fact_ptr.new_full((num_facts + 1,), -1)
    slot = slot.scatter_(0, place.flatten(), column.flatten())[:-1].clone()
    nu = F.pad(nu, (0, 1), value=float("inf"))
    return drawn.gate, drawn.soft, nu, drawn.index, drawn.count, slot


def _torch_bwd(
    d_gate: Tensor,
    d_soft: Tensor,
    logits: Tensor,
    fact_ptr: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    question_key: Tensor | None,
    slot: Tensor,
    nu: Tensor,
    max_facts: int,
    temperature: float,
    budget: bool,
) -> Tensor:
    """dl = d (g - m) / T with d = s (1 - s), g the gradient of s, and m = (d . g) / sum(d) in a
    budget, else 0; nothing where x is certain."""
    num_facts = logits.shape[0]
    noise = _given_or_drawn(noise, seed, question_key, fact_ptr, num_facts)
    key = logits.to(nu.dtype)
    key = key if noise is None else key + noise
    segment = segment_ids(fact_ptr, num_facts)
    x = key / temperature
    soft = torch.sigmoid(x.clamp(-CERTAIN, CERTAIN) - nu.index_select(0, segment))
    slope = soft * (1 - soft)
    place = torch.where(slot >= 0, segment * d_gate.shape[1] + slot, d_gate.numel())
    grad = d_soft + F.pad(d_gate.flatten(), (0, 1))[place]
    if budget:
        steepness = torch.zeros_like(nu).index_add_(0, segment, slope).clamp_(min=1e-30)
        mean = torch.zeros_like(nu).index_add_(0, segment, slope * grad).div_(steepness)
        grad = grad - mean.index_select(0, segment)
    d_logits = (slope * grad / temperature).masked_fill(x.abs() > CERTAIN, 0.0)
    return d_logits.to(logits.dtype)


def _fwd_fake(
    logits: Tensor,
    fact_ptr: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    question_key: Tensor | None,
    k: int,
    *options: object,
) -> tuple[Tensor, ...]:
    num_questions, dtype = fact_ptr.shape[0] - 1, accumulator_dtype(logits)
    return (
        logits.new_empty(num_questions, k, dtype=dtype),
        logits.new_empty(logits.shape, dtype=dtype),
        logits.new_empty(num_questions + 1, dtype=dtype),
        fact_ptr.new_empty(num_questions, k),
        fact_ptr.new_empty(num_questions),
        fact_ptr.new_empty(logits.shape),
    )


def _bwd_fake(d_gate: Tensor, d_soft: Tensor, logits: Tensor, *rest: object) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup(ctx: object, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
    logits, fact_ptr, noise, seed, question_key, _, max_facts, _, temperature, *flags = inputs
    budget, concrete, triton = flags
    if not concrete:  # x = l
        noise = seed = question_key = None
        temperature = 1.0
    _, _, nu, _, _, slot = output
    ctx.save_for_backward(logits, fact_ptr, noise, seed, question_key, slot, nu)
    ctx.options = (max_facts, temperature, budget, triton)


def _backward(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
    d_gate, d_soft, *_ = grads
    d_logits = torch.ops.dragkit.gumbel_topk_bwd(d_gate, d_soft, *ctx.saved_tensors, *ctx.options)
    return d_logits, *(None,) * 11


register(
    "gumbel_topk_fwd(Tensor logits, Tensor fact_ptr, Tensor? noise, Tensor? seed,"
    " Tensor? question_key, SymInt k, SymInt max_facts, float bound, float temperature,"
    " bool budget, bool concrete, bool triton)"
    " -> (Tensor gate, Tensor soft, Tensor nu, Tensor index, Tensor count, Tensor slot)",
    _torch_fwd,
    _fwd_fake,
    triton=gumbel_topk_fwd,
)
register(
    "gumbel_topk_bwd(Tensor d_gate, Tensor d_soft, Tensor logits, Tensor fact_ptr, Tensor? noise,"
    " Tensor? seed, Tensor? question_key, Tensor slot, Tensor nu, SymInt max_facts,"
    " float temperature, bool budget, bool triton) -> Tensor",
    _torch_bwd,
    _bwd_fake,
    triton=gumbel_topk_bwd,
)
register_gradient("gumbel_topk_fwd", _backward, _setup)
forbid_gradient("gumbel_topk_bwd")
