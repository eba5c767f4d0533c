"""The score function of a draw against exact probabilities of every selection."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dragkit.retriever.losses import draw_gradient, leave_one_out_weight
from dragkit_kernels import draw_score, gumbel_topk, logistic_noise
from tests.ops.exact_k_cases import offsets

# Limits of the keys between which the logistic race is integrated, and its number of steps.
_REACH, _STEPS = 40.0, 40_001


def race(logits: Tensor, first: tuple[int, ...], low: float, high: float) -> Tensor:
    """P(the keys of `first` exceed all others, and the largest other key is in [low, high])."""
    others = [i for i in range(len(logits)) if i not in first]
    if not others:
        return torch.ones((), dtype=torch.float64)
    x = torch.linspace(low, high, _STEPS, dtype=torch.float64).unsqueeze(1)
    below, density = torch.sigmoid(x - logits), torch.sigmoid(x - logits)
    density = density * (1 - density)
    total = torch.zeros((), dtype=torch.float64)
    for largest in others:
        product = density[:, largest]
        for i in range(len(logits)):
            if i in first:
                product = product * (1 - below[:, i])
            elif i != largest:
                product = product * below[:, i]
        total = total + torch.trapezoid(product, x[:, 0])
    return total


def probability(logits: Tensor, chosen: tuple[int, ...], k: int, mode: str) -> Tensor:
    """Exact probability that `gumbel_topk` selects a set, differentiable in the logits."""
    n = len(logits)
    if mode == "exact_k":
        exact = len(chosen) == min(k, n)
        return race(logits, chosen, -_REACH, _REACH) if exact else torch.zeros(())
    p = torch.sigmoid(logits)
    result = torch.zeros((), dtype=torch.float64)
    if 1 <= len(chosen) <= k:
        result = torch.stack([p[i] if i in chosen else 1 - p[i] for i in range(n)]).prod()
    if len(chosen) == k < n:
        # More than k keys are above 0, so the largest that is left out is too.
        result = result + race(logits, chosen, 0.0, _REACH)
    if len(chosen) == 1:
        # No key is above 0, and this one is the largest.
        x = torch.linspace(-_REACH, 0.0, _STEPS, dtype=torch.float64).unsqueeze(1)
        below = torch.sigmoid(x - logits)
        own = below[:, chosen[0]] * (1 - below[:, chosen[0]])
        others = [below[:, i] for i in range(n) if i not in chosen]
        product = torch.stack([own, *others]).prod(0)
        result = result + torch.trapezoid(product, x[:, 0])
    return result


def sets(n: int) -> list[tuple[int, ...]]:
    return [s for size in range(1, n + 1) for s in itertools.combinations(range(n), size)]


@pytest.mark.parametrize(
    ("mode", "k"), [("bernoulli", 4), ("bernoulli", 2), ("bernoulli", 1), ("exact_k", 2)]
)
def test_mean_of_loss_times_score_is_the_exact_gradient(mode: str, k: int) -> None:
    """Draws of none, of few and of more than k facts occur, so every rule of the score counts."""
    logits = torch.tensor([-1.2, 0.4, -0.3, 0.9], dtype=torch.float64, requires_grad=True)
    value = {s: float(v) for s, v in zip(sets(4), torch.randn(15), strict=True)}
    chances = {s: probability(logits, s, k, mode) for s in sets(4)}
    assert float(sum(chances.values())) == pytest.approx(1, abs=1e-6)
    expected = sum(chance * value[s] for s, chance in chances.items())
    (exact,) = torch.autograd.grad(expected, logits)

    # Many questions with one draw each are one question with many draws.
    draws = 100_000
    ptr, given = offsets([4] * draws), logits.detach().float().repeat(draws)
    noise = logistic_noise(torch.tensor(3), torch.arange(draws), ptr, num_facts=4 * draws)
    drawn = gumbel_topk(given, ptr, k, noise=noise, mode=mode, max_facts=4)
    chosen = torch.zeros(4 * draws + 1, dtype=torch.int64)
    chosen[drawn.index.flatten().long()] = 1
    code = (chosen[:-1].view(draws, 4) * torch.tensor([1, 2, 4, 8])).sum(1)
    table = torch.zeros(16)
    for s, v in value.items():
        table[sum(1 << i for i in s)] = v
    score = draw_score(given, noise.unsqueeze(0), ptr, k, mode).view(draws, 4)
    samples = table[code].unsqueeze(1) * score
    error = samples.std(0) / draws**0.5
    assert ((samples.mean(0) - exact).abs() < 4 * error + 1e-6).all()


def test_signs_alone_have_less_variance_than_keys() -> None:
    logits, ptr = torch.tensor([2.0, -2.0, 0.0]), offsets([3])
    noise = logistic_noise(torch.tensor(1), torch.tensor([1]), ptr, num_facts=3, num_draws=4000)
    score = draw_score(logits, noise, ptr, 3)
    fires = (logits + noise > 0).sum(1) > 0
    assert (score[fires].var(0) < torch.tanh(noise[fires] / 2).var(0)).all()


def test_padding_rows_and_questions_without_a_choice_have_no_score() -> None:
    ptr, noise = offsets([2, 0, 5]), torch.randn(3, 9)
    score = draw_score(torch.zeros(9), noise, ptr, 2, "exact_k")
    assert not score[:, :2].any() and not score[:, 7:].any() and bool(score[:, 2:7].all())
    assert not draw_score(torch.zeros(9), noise, ptr, 2)[:, 7:].any()


def test_leave_one_out_compares_each_draw_with_the_mean_of_the_others() -> None:
    loss = torch.tensor([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]])
    score = torch.randn(3, 4)
    graph = torch.tensor([0, 0, 1, 2])  # the last row is padding
    gradient = draw_gradient(leave_one_out_weight(loss), score, graph)
    weight = torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5]) / 3
    expected = (weight.unsqueeze(1) * score).sum(0)
    torch.testing.assert_close(gradient[:2], expected[:2])
    # Equal losses say nothing about a draw, and padding rows have no question.
    assert not gradient[2:].any()
