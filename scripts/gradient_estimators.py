"""Estimators of the gradient of a draw's expected loss at the fact logits, and the exact gradient.

The loss of every subset is given (`subset_tables`), so that an estimate costs no generator pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from subset_tables import SubsetTables, all_subsets, subset_number
from torch import Tensor

from dragkit.retriever.losses import draw_gradient, leave_one_out_weight, posterior_weight
from dragkit_kernels import draw_score, gumbel_topk, logistic_noise

# Step of the one-dimensional integrals.
_STEP = 1 / 32


def subset_probability(logits: Tensor, k: int, mode: str = "bernoulli") -> Tensor:
    """Probability of each subset in a draw of `gumbel_topk`, differentiable.

    Between 1 and k - 1 facts, "bernoulli" draws with independent probabilities. Where more fire,
    the k largest keys are selected: the smallest key x of the subset is positive, and the keys of
    all other facts are below it. Where none fires, the fact with the largest key is selected. Both
    are integrals over x, as is a draw of "exact_k".

    Args:
        logits: float64 [n].
        k: maximum number of facts, from 1 to n.
        mode: "bernoulli" or "exact_k".

    Returns:
        float64 [2^n], in the order of `all_subsets`.
    """
    drawn = all_subsets(len(logits))
    size = drawn.sum(1)
    probability = torch.zeros(len(drawn), dtype=logits.dtype)
    at_k = _integral(logits, drawn[size == k], 1)
    if mode == "exact_k":
        at_k = at_k + _integral(logits, drawn[size == k], -1)
        return probability.masked_scatter(size == k, at_k)
    log_p = torch.where(drawn, F.logsigmoid(logits), F.logsigmoid(-logits)).sum(1)
    probability = torch.where((size > 0) & (size < k), log_p.exp(), probability)
    probability = probability.masked_scatter(size == k, at_k)
    best = torch.eye(len(logits), dtype=torch.bool)
    return probability.index_add(0, subset_number(best), _integral(logits, best, -1))


def _integral(logits: Tensor, drawn: Tensor, sign: int) -> Tensor:
    """[S] probability that each subset has the largest keys, the smallest of them of this sign."""
    # |x| = exp(t - exp(-t)): the integrand is smooth in t and decays doubly exponentially at both
    # ends, where the trapezoidal rule is exact to rounding.
    t = torch.arange(-4.0, 5.0, _STEP, dtype=logits.dtype)
    size = (t - (-t).exp()).exp()
    weight = _STEP * size * (1 + (-t).exp())
    key = (sign * size).unsqueeze(1) - logits  # [T, n]
    below, above = torch.sigmoid(key), torch.sigmoid(-key)
    drawn = drawn.unsqueeze(1)  # [S, 1, n]
    others = torch.where(drawn, above, below).prod(2)
    # The density of a logistic variable over P(it is larger) is P(it is smaller).
    hazard = torch.where(drawn, below, 0.0).sum(2)
    return others * hazard @ weight


def exact_gradient(logits: Tensor, loss: Tensor, k: int, mode: str = "bernoulli") -> Tensor:
    """Gradient at the logits, float64 [n], of the expected loss of a draw. `loss` is [2^n]."""
    logits = logits.detach().requires_grad_()
    expected = subset_probability(logits, k, mode) @ loss
    return torch.autograd.grad(expected, logits)[0]


def exact_marginal_gradient(logits: Tensor, loss: Tensor, k: int) -> Tensor:
    """Gradient at the logits, float64 [n], of -log of the expected likelihood of the answer."""
    logits = logits.detach().requires_grad_()
    log_p = subset_probability(logits, k).clamp(min=1e-300).log()
    return torch.autograd.grad(-(log_p - loss).logsumexp(0), logits)[0]


class Draws(NamedTuple):
    """R repetitions of M draws of one question, made by the product's ops.

    Attributes:
        noise: float64 [M, R, n] logistic noise.
        fires: float64 [M, R, n] whether a key is positive.
        drawn: float64 [M, R, n] whether a fact is selected. It differs from `fires` where none
            fires, or more than k.
        subset: int64 [M, R] number of the selected subset.
        score: float64 [M, R, n] `draw_score`.
    """

    noise: Tensor
    fires: Tensor
    drawn: Tensor
    subset: Tensor
    score: Tensor


def noise_of(num_facts: int, repetitions: int, num_draws: int, seed: int) -> Tensor:
    """Independent noise, float64 [M, R, n], of the generator that training uses."""
    ptr = torch.arange(repetitions + 1, dtype=torch.int32) * num_facts
    noise = logistic_noise(torch.tensor(seed), torch.arange(repetitions), ptr, num_draws=num_draws)
    return noise.double().unflatten(1, (repetitions, num_facts))


def draw(logits: Tensor, noise: Tensor, k: int) -> Draws:
    """Draws of "bernoulli" with given noise, float64 [M, R, n]."""
    _, repetitions, n = noise.shape
    flat, packed, ptr = noise.flatten(1), logits.repeat(repetitions), _ptr(repetitions, n)
    index = gumbel_topk(packed, ptr, k, noise=flat, max_facts=n).index.long()
    # Slots without a fact write to a spare last entry.
    drawn = packed.new_zeros(len(noise), packed.shape[0] + 1)
    drawn.scatter_(1, index.flatten(1).remainder(packed.shape[0] + 1), 1.0)
    drawn = drawn[:, :-1].view_as(noise)
    score = draw_score(packed, flat, ptr, k).view_as(noise)
    fires = (logits + noise > 0).to(noise.dtype)
    return Draws(noise, fires, drawn, subset_number(drawn > 0), score)


def _ptr(repetitions: int, num_facts: int) -> Tensor:
    return torch.arange(repetitions + 1, dtype=torch.int32) * num_facts


def straight_through(
    logits: Tensor,
    table: Tensor,
    noise: Tensor,
    *,
    k: int,
    estimator: str,
    temperature: float = 0.5,
    mode: str = "bernoulli",
) -> Tensor:
    """Estimates [R, n] of the gates of `gumbel_topk`, averaged over M draws.

    Args:
        logits: float64 [n].
        table: float64 [2^n, n] gradient of the loss at the gates in each subset.
        noise: float64 [M, R, n].
        k, estimator, temperature, mode: see `gumbel_topk`.
    """
    draws, repetitions, n = noise.shape
    packed = logits.repeat(repetitions).requires_grad_()
    selection = gumbel_topk(
        packed,
        _ptr(repetitions, n),
        k,
        noise=noise.flatten(1),
        mode=mode,
        estimator=estimator,
        temperature=temperature,
        max_facts=n,
    )
    size = packed.shape[0]
    drawn = torch.zeros(draws, size + 1, dtype=torch.bool)
    drawn.scatter_(1, selection.index.long().flatten(1).remainder(size + 1), True)
    subset = subset_number(drawn[:, :-1].view_as(noise))
    # `soft` has the derivative of the gates.
    total = (selection.soft.view_as(noise) * table[subset]).sum() / draws
    return torch.autograd.grad(total, packed)[0].view(repetitions, n)


def weighted_scores(weight: Tensor, score: Tensor) -> Tensor:
    """Estimates [R, n] of the product's `draw_gradient`. weight [M, R], score [M, R, n]."""
    _, repetitions, n = score.shape
    graph = torch.arange(repetitions).repeat_interleave(n)
    return draw_gradient(weight, score.flatten(1), graph).view(repetitions, n)


def leave_one_out(loss: Tensor, score: Tensor) -> Tensor:
    """Estimates [R, n] of the gradient of the expected loss. loss [M, R], score [M, R, n]."""
    return weighted_scores(leave_one_out_weight(loss), score)


def leave_one_out_with_control(loss: Tensor, draws: Draws, slope: Tensor, p: Tensor) -> Tensor:
    """Leave-one-out after subtracting the linear function `slope` . z, whose gradient is known."""
    rest = loss - draws.fires @ slope
    return leave_one_out(rest, draws.score) + slope * p * (1 - p)


def disarm(logits: Tensor, loss: Tensor, noise: Tensor, k: int) -> Tensor:
    """DisARM (Dong et al., 2020): pairs with opposite noise. `noise` is [M / 2, R, n].

    Where the keys' order decides a selection of the pair, the score of the keys replaces its mean.
    """
    first, second = draw(logits, noise, k), draw(logits, -noise, k)
    differ = first.fires - second.fires
    mean = differ * torch.sigmoid(logits.abs())
    by_signs = (first.fires == first.drawn).all(2) & (second.fires == second.drawn).all(2)
    score = torch.where(by_signs.unsqueeze(2), mean, torch.tanh(noise / 2))
    difference = (loss[first.subset] - loss[second.subset]).unsqueeze(2)
    return (difference * score / 2).mean(0)


def arms(logits: Tensor, loss: Tensor, uniform: Tensor, k: int) -> Tensor:
    """ARMS (Dimitriev and Zhou, 2021): M draws with negatively correlated noise.

    It takes the score of the signs, which ignores that the keys' order decides an empty draw.

    Args:
        logits: float64 [n].
        loss: float64 [2^n].
        uniform: float64 [M, R, n] independent uniform numbers.
        k: maximum number of facts.
    """
    others, p = len(uniform) - 1, torch.sigmoid(logits)
    spacing = -uniform.log()
    spacing = spacing / spacing.sum(0)
    copula = 1 - (1 - spacing) ** others
    # P(two draws fire) where a fact fires above 1 - p of the copula, or below p.
    above = (2 * p ** (1 / others) - 1).clamp(min=0) ** others
    below = 2 * p - 1 + (2 * (1 - p) ** (1 / others) - 1).clamp(min=0) ** others
    copula = torch.where(above < below, copula, 1 - copula)
    correlation = (torch.minimum(above, below) - p * p) / (p * (1 - p))
    draws = draw(logits, copula.logit(eps=1e-12), k)
    return leave_one_out(loss[draws.subset], (draws.fires - p) / (1 - correlation))


class Estimates(NamedTuple):
    """R estimates of an estimator for one question.

    Attributes:
        family: estimators of a family differ in their number of draws.
        prompts: prompts of one estimate.
        values: float64 [R, n].
        exact: float64 [n] gradient of the expected loss that the estimator is about.
    """

    name: str
    family: str
    prompts: int
    values: Tensor
    exact: Tensor


def all_estimates(tables: SubsetTables, repetitions: int, seed: int) -> Iterator[Estimates]:
    """Estimates of every estimator for one question, in the order of the table."""
    logits, loss = tables.logits, tables.loss
    n = len(logits)
    p = torch.sigmoid(logits)
    exact = exact_gradient(logits, loss, n)
    one = noise_of(n, repetitions, 1, seed)
    for label, options in _GATES.items():
        for name, gates in (("vector gate", tables.vector_gate), ("log-gate", tables.log_gate)):
            values = straight_through(logits, gates, one, k=n, **options)
            yield Estimates(f"{name}, {label}", name, 1, values, exact)
    k = int(p.sum().round().clamp(1, n - 1))
    for label, options in _GATES.items():
        target = exact_gradient(logits, loss, k, "exact_k")
        values = straight_through(logits, tables.vector_gate, one, k=k, mode="exact_k", **options)
        yield Estimates(f"vector gate, exact_k, {label}", "vector gate, exact_k", 1, values, target)
    for draws in (2, 4):
        noise = noise_of(n, repetitions, draws, seed)
        values = straight_through(logits, tables.log_gate, noise, k=n, **_GATES["mean"])
        yield Estimates(f"log-gate, mean, {draws} draws", "log-gate", draws, values, exact)
    field = (tables.mean_field * p * (1 - p)).expand(repetitions, n)
    yield Estimates("mean field", "mean field", 1, field, exact)
    for temperature, values in tables.soft.items():
        for draws in (1, 2, 4):
            name = f"soft gates T={temperature:g}"
            mean = values.unflatten(0, (-1, draws)).mean(1)
            count = "1 draw" if draws == 1 else f"{draws} draws"
            yield Estimates(f"{name}, {count}", name, draws, mean, exact)
    for count in (2, 4, 8):
        draws = draw(logits, noise_of(n, repetitions, count, seed), n)
        losses = loss[draws.subset]
        values = leave_one_out(losses, draws.score)
        yield Estimates(f"leave-one-out M={count}", "leave-one-out", count, values, exact)
        values = weighted_scores(posterior_weight(losses), draws.score)
        marginal = exact_marginal_gradient(logits, loss, n)
        yield Estimates(f"marginal M={count}", "marginal", count, values, marginal)
        values = leave_one_out(losses, draws.fires - p)
        name = "leave-one-out, score of signs"
        yield Estimates(f"{name}, M={count}", name, count, values, exact)
        values = leave_one_out_with_control(losses, draws, tables.mean_field, p)
        name = "leave-one-out and mean field"
        yield Estimates(f"{name}, M={count}", name, count + 1, values, exact)
        values = disarm(logits, loss, noise_of(n, repetitions, count // 2, seed), n)
        yield Estimates(f"DisARM M={count}", "DisARM", count, values, exact)
        if count > 2:
            uniform = torch.sigmoid(noise_of(n, repetitions, count, seed))
            values = arms(logits, loss, uniform, n)
            yield Estimates(f"ARMS M={count}", "ARMS", count, values, exact)


_GATES: dict[str, dict] = {
    "concrete T=0.5": {"estimator": "binary_concrete", "temperature": 0.5},
    "concrete T=1": {"estimator": "binary_concrete", "temperature": 1.0},
    "mean": {"estimator": "straight_through"},
}
