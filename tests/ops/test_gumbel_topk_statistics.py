"""Frequencies of drawn facts, and sums of the relaxed choice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dragkit_kernels import gumbel_topk
from dragkit_kernels.testing import assert_close
from tests.ops.exact_k_cases import offsets, solve_threshold


def exact_k_soft(logits: Tensor, sizes: list[int], k: int) -> Tensor:
    noise = torch.zeros(logits.shape[0])
    return gumbel_topk(
        logits, offsets(sizes), k, noise=noise, mode="exact_k", estimator="straight_through"
    ).soft


def test_exact_k_probabilities_sum_to_k_at_any_scale() -> None:
    for scale, shift in ((1e-3, 0.0), (1.0, 300.0), (50.0, -100.0), (1e3, 0.0)):
        logits = scale * torch.randn(4000) + shift
        soft = exact_k_soft(logits, [1500, 2500], 100)
        for piece in soft.split([1500, 2500]):
            assert float(piece.sum()) == pytest.approx(100, rel=2e-2 if scale > 10 else 1e-3)


def test_equal_logits_have_equal_probabilities() -> None:
    soft = exact_k_soft(torch.full((10,), 2.0), [10], 4)
    assert_close(soft, torch.full((10,), 0.4))


def test_bernoulli_draws_facts_with_their_probability() -> None:
    copies = 6000
    logits = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0, 9.0])
    drawn = gumbel_topk(
        logits.repeat(copies),
        offsets([6] * copies),
        6,
        temperature=0.5,
        seed=torch.tensor(5),
        question_key=torch.arange(copies),
        max_facts=6,
    )
    chosen = drawn.index[drawn.index >= 0].long() % 6
    frequency = torch.bincount(chosen, minlength=6).double() / copies
    p = torch.sigmoid(logits.double())
    sigma = (p * (1 - p) / copies).sqrt()
    # The last fact is drawn nearly always, so no draw is empty.
    assert ((frequency - p).abs() <= 4 * sigma + 1e-3 * (p > 0.99)).all()


def test_exact_k_draws_facts_with_probability_sigmoid_l_minus_nu() -> None:
    copies, facts, k = 20_000, 30, 6
    logits = 2 * torch.randn(facts)
    drawn = gumbel_topk(
        logits.repeat(copies),
        offsets([facts] * copies),
        k,
        seed=torch.tensor(6),
        question_key=torch.arange(copies),
        mode="exact_k",
        estimator="straight_through",
        max_facts=facts,
    )
    assert (drawn.count == k).all()
    frequency = torch.bincount(drawn.index.flatten().long() % facts, minlength=facts) / copies
    nu = solve_threshold(logits.tolist(), k)
    assert (frequency - torch.sigmoid(logits - nu)).abs().max() < 0.01
    assert_close(drawn.soft[:facts], torch.sigmoid(logits - nu), tolerance=1e-5)
