"""The choice of facts against sorting in Python, and its gradients against their formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dragkit_kernels import (
    GumbelTopK,
    check_finite_logits,
    gumbel_topk,
    gumbel_topk_ref,
    top_facts,
)
from dragkit_kernels.testing import assert_close, strided_like
from tests.ops.budget_cases import solve_threshold

SIZES = [0, 7, 1, 0, 12, 3, 0]
INF = float("inf")


def offsets(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).int()


def draw(logits: Tensor, sizes: list[int], k: int, **options: object) -> GumbelTopK:
    options.setdefault("noise", torch.zeros(logits.shape[0], dtype=logits.dtype))
    return gumbel_topk(logits, offsets(sizes), k, **options)


def expected_index(
    keys: list[float], sizes: list[int], k: int, threshold: float
) -> list[list[int]]:
    rows, first = [], 0
    for size in sizes:
        # sorted() is stable: equal keys stay in the order of the facts.
        ranked = sorted(range(first, first + size), key=lambda e: -keys[e])
        kept = [e for place, e in enumerate(ranked) if place == 0 or keys[e] > threshold][:k]
        rows.append(kept + [-1] * (k - len(kept)))
        first += size
    return rows


def check_shape_of(drawn: GumbelTopK, rows: list[list[int]]) -> None:
    assert drawn.index.dtype == torch.int32 and drawn.count.dtype == torch.int32
    assert drawn.index.tolist() == rows
    assert drawn.gate.tolist() == [[float(e >= 0) for e in row] for row in rows]
    assert drawn.count.tolist() == [sum(e >= 0 for e in row) for row in rows]


@pytest.mark.parametrize("k", [0, 1, 3, 7, 50])
@pytest.mark.parametrize("given_width", [False, True])
def test_selection_matches_sorting(k: int, given_width: bool) -> None:
    total = sum(SIZES)
    logits, noise = torch.randn(total), torch.randn(total)
    keys = (logits + noise).tolist()
    width = {"max_facts": 20} if given_width else {}
    for mode, threshold in (("bernoulli", 0.0), ("budget", -INF)):
        drawn = draw(logits, SIZES, k, noise=noise, mode=mode, **width)
        check_shape_of(drawn, expected_index(keys, SIZES, k, threshold))
        assert drawn.gate.dtype == torch.float32 and drawn.soft.shape == (total,)
    budget = draw(logits, SIZES, k, noise=noise, mode="budget")
    assert budget.count.tolist() == [min(k, size) for size in SIZES]


KEYS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, 2.5000002, -7.0, INF, -INF, 1e-40, 3e38])


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    k=st.integers(0, 7),
    data=st.data(),
)
def test_ties_and_infinities_match_sorting(sizes: list[int], k: int, data: st.DataObject) -> None:
    total = sum(sizes)
    values = data.draw(st.lists(KEYS, min_size=total, max_size=total))
    logits = torch.tensor(values, dtype=torch.float32).requires_grad_()
    for mode, estimator in itertools.product(("bernoulli", "budget"), ("concrete", "mean")):
        drawn = draw(logits, sizes, k, mode=mode, estimator=estimator)
        threshold = 0.0 if mode == "bernoulli" else -INF
        rows = expected_index(logits.tolist(), sizes, k, threshold)
        if mode == "budget":
            assert drawn.count.tolist() == [min(k, size) for size in sizes]
            rows = [
                sorted(range(first, first + n), key=lambda e: -values[e])[:k] + [-1] * max(0, k - n)
                for first, n in zip(offsets(sizes).tolist(), sizes, strict=False)
            ]
        check_shape_of(drawn, rows)
        (grad,) = torch.autograd.grad(drawn.gate.sum() + drawn.soft.sum(), logits)
        assert torch.isfinite(drawn.soft).all() and torch.isfinite(grad).all()


@pytest.mark.parametrize("estimator", ["concrete", "mean"])
def test_bernoulli_gradient_formula(estimator: str) -> None:
    total = sum(SIZES)
    logits = torch.randn(total, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(total, dtype=torch.float64)
    drawn = draw(logits, SIZES, 4, noise=noise, temperature=0.5, estimator=estimator)
    g_gate, g_soft = torch.randn(len(SIZES), 4).double(), torch.randn(total).double()
    (got,) = torch.autograd.grad((drawn.gate * g_gate).sum() + drawn.soft @ g_soft, logits)
    for e in range(total):
        x = logits[e].item()
        if estimator == "concrete":
            x = (x + noise[e].item()) / 0.5
        s = 1 / (1 + math.exp(-x))
        slope = s * (1 - s) / (0.5 if estimator == "concrete" else 1.0)
        g = float(g_soft[e]) + sum(float(g_gate[i, j]) for i, j in (drawn.index == e).nonzero())
        assert float(got[e]) == pytest.approx(slope * g, rel=1e-9, abs=1e-12)
        assert drawn.soft[e].item() == pytest.approx(s, rel=1e-12)


def test_a_forced_fact_keeps_its_own_gradient() -> None:
    logits = torch.tensor([-4.0, -1.0, -3.0], requires_grad=True)
    drawn = draw(logits, [3], 2, temperature=1.0)
    assert drawn.index.tolist() == [[1, -1]]
    (grad,) = torch.autograd.grad(drawn.gate.sum(), logits)
    s = 1 / (1 + math.exp(1.0))
    assert_close(grad, torch.tensor([0.0, s * (1 - s), 0.0]))


@pytest.mark.parametrize("estimator", ["concrete", "mean"])
def test_budget_probability_and_jacobian(estimator: str) -> None:
    """s = sigmoid(x - nu); dl = scale * (d g - d (d . g) / sum d); nothing where all are kept."""
    total, k, temperature = sum(SIZES), 3, 0.7
    logits = 2 * torch.randn(total, dtype=torch.float64)
    logits.requires_grad_()
    noise = torch.randn(total, dtype=torch.float64)
    drawn = draw(
        logits,
        SIZES,
        k,
        noise=noise,
        mode="budget",
        estimator=estimator,
        temperature=temperature,
    )
    g_gate, g_soft = torch.randn(len(SIZES), k).double(), torch.randn(total).double()
    (got,) = torch.autograd.grad((drawn.gate * g_gate).sum() + drawn.soft @ g_soft, logits)
    g = g_soft.clone()
    for row, slots in enumerate(drawn.index.tolist()):
        for slot, e in enumerate(slots):
            if e >= 0:
                g[e] += g_gate[row, slot]
    concrete = estimator == "concrete"
    x = ((logits + noise) / temperature if concrete else logits).detach()
    scale = 1 / temperature if concrete else 1.0
    first = 0
    for size in SIZES:
        part = slice(first, first + size)
        first += size
        if size <= k:
            assert drawn.soft[part].tolist() == [1.0] * size
            assert got[part].tolist() == [0.0] * size
            continue
        p = torch.sigmoid(x[part] - solve_threshold(x[part].tolist(), k))
        d = p * (1 - p)
        assert_close(drawn.soft[part], p, tolerance=1e-9)
        want = scale * (d * g[part] - d * (d @ g[part]) / d.sum())
        assert_close(got[part], want, tolerance=1e-8)


def test_budget_soft_choice_is_differentiable_to_first_order() -> None:
    """The implicit derivative of nu against finite differences."""
    logits = torch.randn(sum(SIZES), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: draw(x, SIZES, 3, mode="budget", estimator="mean").soft, (logits,), eps=1e-4
    )


@pytest.mark.parametrize("mode", ["bernoulli", "budget"])
@pytest.mark.parametrize("estimator", ["concrete", "mean"])
@pytest.mark.parametrize("k", [0, 3, 50])
def test_the_op_equals_its_definition_under_autograd(mode: str, estimator: str, k: int) -> None:
    """The op's backward is written by hand, the reference's is autograd's; padding included."""
    total = sum(SIZES)
    logits = torch.randn(total + 2, dtype=torch.float64)
    logits[:2] = torch.tensor([INF, -INF])
    logits.requires_grad_()
    noise = torch.randn(total + 2, dtype=torch.float64)
    options = {"noise": noise, "mode": mode, "estimator": estimator, "temperature": 0.7}
    results = []
    for function in (gumbel_topk, gumbel_topk_ref):
        drawn = function(logits, offsets(SIZES), k, max_facts=12, **options)
        weight = torch.arange(1.0, drawn.gate.numel() + 1).view_as(drawn.gate).sqrt()
        loss = (weight * drawn.gate).sum() + (drawn.soft * torch.linspace(-1, 2, total + 2)).sum()
        results.append((*drawn, *torch.autograd.grad(loss, logits)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert results[0][3][total:].tolist() == [0.0, 0.0]
    assert results[0][4][[0, 1, total, total + 1]].tolist() == [0.0] * 4


def test_a_draw_does_not_depend_on_the_batch() -> None:
    logits, sizes = torch.randn(sum(SIZES)), SIZES
    keys, seed, ptr = torch.arange(7) * 31, torch.tensor(8), offsets(SIZES)
    for mode in ("bernoulli", "budget"):
        together = gumbel_topk(logits, ptr, 4, seed=seed, question_key=keys, mode=mode)
        for g, size in enumerate(sizes):
            part = slice(int(ptr[g]), int(ptr[g + 1]))
            alone = gumbel_topk(
                logits[part], offsets([size]), 4, seed=seed, question_key=keys[g : g + 1], mode=mode
            )
            shifted = torch.where(alone.index >= 0, alone.index + ptr[g], -1)
            assert torch.equal(shifted[0], together.index[g])
            assert_close(alone.soft, together.soft[part].double())


def test_two_runs_and_strided_inputs_are_bit_equal() -> None:
    logits = torch.randn(sum(SIZES), requires_grad=True)
    roomy = strided_like(logits.detach()).requires_grad_()
    noise = torch.randn(sum(SIZES))
    for mode in ("bernoulli", "budget"):
        results = []
        for x in (logits, logits, roomy):
            drawn = draw(x, SIZES, 4, noise=noise, mode=mode)
            results.append((*drawn, torch.autograd.grad(drawn.gate.sum(), x)[0]))
        for other in results[1:]:
            assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_bfloat16_logits_are_scored_in_float32() -> None:
    logits = torch.randn(sum(SIZES)).bfloat16().requires_grad_()
    drawn = draw(logits, SIZES, 4, noise=torch.zeros(sum(SIZES)))
    assert drawn.gate.dtype == torch.float32 and drawn.soft.dtype == torch.float32
    drawn.soft.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("k", [0, 1, 4, 50])
def test_top_facts(k: int) -> None:
    logits = torch.randn(sum(SIZES)).round(decimals=1)
    logits[:7] = -9.0
    drawn = top_facts(logits, offsets(SIZES), k, 0.4)
    check_shape_of(drawn, expected_index(logits.tolist(), SIZES, k, math.log(0.4 / 0.6)))
    assert_close(drawn.soft, torch.sigmoid(logits.double()), tolerance=1e-6)
    assert not top_facts(logits.requires_grad_(), offsets(SIZES), k).gate.requires_grad


def test_top_facts_without_a_threshold_keeps_k() -> None:
    drawn = top_facts(torch.randn(sum(SIZES)), offsets(SIZES), 5)
    assert drawn.count.tolist() == [min(5, size) for size in SIZES]


def test_top_facts_treats_both_zeros_as_equal() -> None:
    drawn = top_facts(torch.tensor([-1.0, -0.0, 0.0, -0.0]), offsets([4]), 3)
    assert drawn.index.tolist() == [[1, 2, 3]]


def test_no_questions() -> None:
    drawn = draw(torch.zeros(0), [], 3)
    assert drawn.index.shape == (0, 3) and drawn.count.shape == (0,)


def test_check_finite_logits_names_the_questions() -> None:
    logits = torch.zeros(sum(SIZES))
    check_finite_logits(logits, offsets(SIZES))
    logits[9], logits[20] = float("nan"), INF
    with pytest.raises(ValueError, match=r"2 of 23 fact logits .* in questions \[4, 5\]"):
        check_finite_logits(logits, offsets(SIZES))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "both"}, "mode must be one of"),
        ({"estimator": "ste"}, "estimator one of"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"noise": None}, "give either noise, or seed and question_key"),
        ({"seed": torch.tensor(1)}, "not both"),
        ({"noise": torch.zeros(4)}, r"noise must have shape \[3\], got \[4\]"),
        ({"k": -1}, "k must be 0 or more, got -1"),
        ({"logits": torch.zeros(3, 1)}, r"logits must have shape \[\*\], got \[3, 1\]"),
        ({"fact_ptr": torch.tensor([0, 3])}, "fact_ptr must be int32"),
    ],
)
def test_wrong_arguments(changes: dict[str, object], message: str) -> None:
    arguments = {
        "logits": torch.zeros(3),
        "fact_ptr": offsets([3]),
        "k": 2,
        "noise": torch.zeros(3),
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        gumbel_topk(**arguments)
