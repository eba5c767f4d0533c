"""Gradients of the fact selection against their formulas, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dragkit_kernels.testing import assert_close
from tests.ops.exact_k_cases import SIZES, draw, offsets, solve_threshold


def test_bernoulli_gradient_formula() -> None:
    total = sum(SIZES)
    for estimator, temperature in (("binary_concrete", 0.5), ("straight_through", 1.0)):
        logits = torch.randn(total, dtype=torch.float64, requires_grad=True)
        noise = torch.randn(total, dtype=torch.float64)
        drawn = draw(logits, SIZES, 4, noise=noise, temperature=0.5, estimator=estimator)
        g_gate, g_soft = torch.randn(len(SIZES), 4).double(), torch.randn(total).double()
        (got,) = torch.autograd.grad((drawn.gate * g_gate).sum() + drawn.soft @ g_soft, logits)
        for e in range(total):
            x = (
                logits[e].item() + noise[e].item() * (estimator == "binary_concrete")
            ) / temperature
            s = 1 / (1 + math.exp(-x))
            g = float(g_soft[e]) + sum(float(g_gate[i, j]) for i, j in (drawn.index == e).nonzero())
            slope = s * (1 - s) / temperature
            assert float(got[e]) == pytest.approx(slope * g, rel=1e-9, abs=1e-12)
            assert drawn.soft[e].item() == pytest.approx(s, rel=1e-12)


def test_a_forced_fact_keeps_its_own_gradient() -> None:
    logits = torch.tensor([-4.0, -1.0, -3.0], requires_grad=True)
    drawn = draw(logits, [3], 2, temperature=1.0)
    assert drawn.index.tolist() == [[1, -1]]
    (grad,) = torch.autograd.grad(drawn.gate.sum(), logits)
    s = 1 / (1 + math.exp(1.0))
    assert_close(grad, torch.tensor([0.0, s * (1 - s), 0.0]))


@pytest.mark.parametrize("estimator", ["binary_concrete", "straight_through"])
def test_exact_k_probability_and_jacobian(estimator: str) -> None:
    """s = sigmoid(x - nu), dl = scale (d g - d (d . g) / sum d), 0 if all facts are selected."""
    total, k, temperature = sum(SIZES), 3, 0.7
    logits = (2 * torch.randn(total, dtype=torch.float64)).requires_grad_()
    noise = torch.randn(total, dtype=torch.float64)
    options = {"noise": noise, "mode": "exact_k", "temperature": temperature}
    drawn = draw(logits, SIZES, k, estimator=estimator, **options)
    g_gate, g_soft = torch.randn(len(SIZES), k).double(), torch.randn(total).double()
    (got,) = torch.autograd.grad((drawn.gate * g_gate).sum() + drawn.soft @ g_soft, logits)
    g = g_soft.clone()
    for row, slots in enumerate(drawn.index.tolist()):
        for slot, e in enumerate(slots):
            if e >= 0:
                g[e] += g_gate[row, slot]
    is_concrete = estimator == "binary_concrete"
    x = ((logits + noise) / temperature if is_concrete else logits).detach()
    scale = 1 / temperature if is_concrete else 1.0
    for size, first in zip(SIZES, offsets(SIZES).tolist(), strict=False):
        part = slice(first, first + size)
        if size <= k:
            assert drawn.soft[part].tolist() == [1.0] * size
            assert got[part].tolist() == [0.0] * size
            continue
        p = torch.sigmoid(x[part] - solve_threshold(x[part].tolist(), k))
        d = p * (1 - p)
        assert_close(drawn.soft[part], p, tolerance=1e-9)
        want = scale * (d * g[part] - d * (d @ g[part]) / d.sum())
        assert_close(got[part], want, tolerance=1e-8)


def test_exact_k_soft_choice_has_the_gradient_of_differences() -> None:
    """Compares the implicit derivative of nu with finite differences."""
    logits = torch.randn(sum(SIZES), dtype=torch.float64, requires_grad=True)

    def soft(x: Tensor) -> Tensor:
        return draw(x, SIZES, 3, mode="exact_k", estimator="straight_through").soft

    assert torch.autograd.gradcheck(soft, (logits,), eps=1e-4)
