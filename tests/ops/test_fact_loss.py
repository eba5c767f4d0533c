"""The loss of the fact scores against its definition, pair by pair, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dragkit_kernels import fact_loss, fact_loss_ref
from dragkit_kernels.testing import assert_close, strided_like

# Facts per question. Empty questions stand first, in the middle and last.
SIZES = [0, 7, 0, 1, 12, 5, 30, 257, 0]
FORWARD = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def ptr_of(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).int()


def make(
    sizes: list[int], *, share: float = 0.3, padding: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 logits, labels, fact_ptr. Question 4 has no positive, and question 5 no negative."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes) + padding
    logits = 2 * torch.randn(count, generator=generator, dtype=torch.float64)
    label = (torch.rand(count, generator=generator) < share).float()
    ptr = ptr_of(sizes)
    if len(sizes) > 5:
        label[ptr[4] : ptr[5]] = 0
        label[ptr[5] : ptr[6]] = 1
    return logits, label, ptr


def by_definition(
    logits: Tensor, label: Tensor, ptr: Tensor, rho: float, margin: float
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of every question, pair by pair."""
    l, y = logits.tolist(), label.tolist()  # noqa: E741
    losses, gradient = [], [0.0] * len(l)
    for begin, end in zip(ptr[:-1].tolist(), ptr[1:].tolist(), strict=True):
        positive = [e for e in range(begin, end) if y[e] > 0.5]
        negative = [e for e in range(begin, end) if not y[e] > 0.5]
        total = 0.0
        if positive:
            for e in range(begin, end):
                sign = -1 if y[e] > 0.5 else 1
                size = math.exp(-abs(l[e]))
                right = sign * l[e] < 0
                total += rho * (math.log1p(size) + (0 if right else abs(l[e]))) / (end - begin)
                sigmoid = (size if right else 1) / (1 + size)
                gradient[e] += rho * sign * sigmoid / (end - begin)
            share = (1 - rho) / max(len(positive) * len(negative), 1)
            for p in positive:
                for q in negative:
                    hinge = margin - (l[p] - l[q])
                    if hinge > 0:
                        total += share * hinge
                        gradient[p] -= share
                        gradient[q] += share
        losses.append(total)
    double = torch.float64
    return torch.tensor(losses, dtype=double), torch.tensor(gradient, dtype=double)


def both(
    logits: Tensor, label: Tensor, ptr: Tensor, grad: Tensor | None = None, **options: object
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the op."""
    tried = logits.detach().requires_grad_()
    options = {"rho": 0.7, "margin": 1.0, **options}
    loss = fact_loss(tried, label, ptr, **options)
    grad = torch.ones_like(loss) if grad is None else grad.to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, tried, grad)[0]


@pytest.mark.parametrize("margin", [0.0, 1.0, 0.3, 5.0, -1.0, 1e4])
@pytest.mark.parametrize("rho", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("dtype", list(FORWARD), ids=str)
def test_matches_the_definition(dtype: torch.dtype, rho: float, margin: float) -> None:
    logits, label, ptr = make(SIZES)
    logits = logits.to(dtype)
    want, slope = by_definition(logits.double(), label, ptr, rho, margin)
    loss, gradient = both(logits, label.to(dtype), ptr, rho=rho, margin=margin)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    assert_close(loss, want, tolerance=FORWARD[dtype])
    assert_close(gradient, slope)


@pytest.mark.parametrize("sizes", [[], [0], [0, 0], [1], [5, 0], [40, 3]], ids=str)
@pytest.mark.parametrize("padding", [0, 6])
def test_small_packs_and_padding(sizes: list[int], padding: int) -> None:
    logits, label, ptr = make(sizes, padding=padding)
    logits[sum(sizes) :] = math.nan
    label[sum(sizes) :] = 1
    want, slope = by_definition(logits, label, ptr, 0.7, 1.0)
    for dtype in (torch.float32, torch.float64):
        loss, gradient = both(logits.to(dtype), label, ptr)
        assert_close(loss, want)
        assert_close(gradient, slope)
        assert not gradient[sum(sizes) :].any()


def test_reference_matches_the_definition() -> None:
    logits, label, ptr = make(SIZES, padding=4)
    want, slope = by_definition(logits, label, ptr, 0.7, 1.0)
    tried = logits.requires_grad_()
    loss = fact_loss_ref(tried, label, ptr, rho=0.7, margin=1.0)
    assert_close(loss, want)
    assert_close(torch.autograd.grad(loss.sum(), tried)[0], slope)
    assert fact_loss_ref(tried[:0], label[:0], ptr[:1], rho=0.7, margin=1.0).shape == (0,)


@pytest.mark.parametrize("facts", [5000])
def test_many_facts_and_positives(facts: int) -> None:
    torch.manual_seed(0)
    logits, ptr = torch.randn(facts + 20), ptr_of([facts, 20])
    label = torch.zeros(facts + 20)
    label[torch.randperm(facts)[:500]] = 1
    label[facts + 3] = 1
    exact = logits.double().requires_grad_()
    want = fact_loss_ref(exact, label, ptr, rho=0.7, margin=1.0)
    loss, gradient = both(logits, label, ptr)
    assert_close(loss, want, tolerance=2e-6)
    assert_close(gradient, torch.autograd.grad(want.sum(), exact)[0])


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("margin", [1.0, 0.7])
def test_a_common_offset_loses_no_precision(offset: float, margin: float) -> None:
    """The logits are coarse, so that many pairs lie at or near the margin."""
    logits, label, ptr = make([50, 300])
    logits = (logits.float() + offset).half().float() if offset == 0 else logits.float() + offset
    want, slope = by_definition(logits.double(), label, ptr, 0.0, margin)
    loss, gradient = both(logits, label, ptr, rho=0.0, margin=margin)
    assert_close(loss, want, tolerance=2e-6)
    assert_close(gradient, slope, tolerance=1e-6)


def test_ties_at_the_margin_have_no_loss() -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 2.0, 0.0, -0.0, 0.0])
    label = torch.tensor([1.0, 0, 0, 1, 1, 0, 0])
    ptr = ptr_of([4, 3])
    for dtype in (torch.float32, torch.float64, torch.float16):
        loss, gradient = both(logits[:4].to(dtype), label[:4], ptr[:2], rho=0.0)
        assert not loss.any() and not gradient.any()
        loss, gradient = both(logits.to(dtype), label, ptr, rho=0.0, margin=0.0)
        assert not loss.any() and not gradient.any()
    above = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    loss, gradient = both(torch.stack([logits[0], above]), label[:2], ptr_of([2]), rho=0.0)
    assert loss > 0 and gradient.tolist() == [-1, 1]
    # 1 - 0.4 lies between two float32 numbers. Only the upper one violates the margin.
    upper = torch.tensor(0.6)
    for number, slope in ((upper, 1), (torch.nextafter(upper, -upper), 0)):
        pair = torch.stack([torch.ones(()), number])
        _, gradient = both(pair, label[:2], ptr_of([2]), rho=0.0, margin=0.4)
        assert gradient.tolist() == [-slope, slope]


def test_many_equal_logits() -> None:
    """There are ties among positives, among negatives and between them."""
    torch.manual_seed(1)
    logits = torch.randint(-3, 4, (90,)).double() / 2
    label, ptr = (torch.rand(90) < 0.4).float(), ptr_of([60, 30])
    for margin in (0.0, 0.5, 1.0, -0.5):
        want, slope = by_definition(logits, label, ptr, 0.3, margin)
        for dtype in (torch.float32, torch.float64):
            loss, gradient = both(logits.to(dtype), label, ptr, rho=0.3, margin=margin)
            assert_close(loss, want)
            assert_close(gradient, slope)


def test_confident_facts_keep_their_precision() -> None:
    logits, label, ptr = torch.tensor([15.0, -15.0, 12.0]), torch.tensor([1.0, 0, 1]), ptr_of([3])
    want, slope = by_definition(logits.double(), label, ptr, 1.0, 1.0)
    loss, gradient = both(logits, label, ptr, rho=1.0)
    torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient.double(), slope, rtol=2e-6, atol=0)


def test_huge_logits_and_margins_stay_finite() -> None:
    logits, label = torch.tensor([1e4, -1e4, 3e4, -3e38, 3e38]), torch.tensor([0.0, 1, 0, 0, 1])
    for margin in (1.0, 1e6, 1e30, -1e30):
        want, slope = by_definition(logits.double(), label, ptr_of([5]), 0.5, margin)
        loss, gradient = both(logits, label, ptr_of([5]), rho=0.5, margin=margin)
        assert_close(loss, want, tolerance=2e-6)
        assert_close(gradient, slope)


def test_nan_stays_in_its_question() -> None:
    for fact in range(6):
        logits, label, ptr = make([6, 9, 4])
        logits, label = logits.float(), torch.tensor([1.0, 0] * 9 + [0])
        label[15:] = 0
        want, slope = both(logits, label, ptr)
        broken = logits.clone()
        broken[fact] = broken[16] = math.nan
        loss, gradient = both(broken, label, ptr)
        assert loss[0].isnan() and torch.equal(loss[1:], want[1:]) and loss[2] == 0
        assert gradient[:6].isnan().all() and torch.equal(gradient[6:], slope[6:])
        loss, _ = both(broken, label, ptr, rho=0.0)
        assert loss[0].isnan() and not loss[1:].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_logits_count_as_the_limit(dtype: torch.dtype) -> None:
    inf = math.inf
    label, ptr = torch.tensor([1.0, 0, 0, 1, 0]), ptr_of([3, 2])
    right = torch.tensor([inf, -inf, 0.0, 0.5, 1.0], dtype=dtype)
    far = right.nan_to_num(posinf=1e4, neginf=-1e4)
    for got, want in zip(both(right, label, ptr), both(far, label, ptr), strict=True):
        assert_close(got, want)
    wrong = torch.tensor([-inf, inf, 0.0, 0.5, 1.0], dtype=dtype)
    far = wrong.nan_to_num(posinf=1e4, neginf=-1e4)
    loss, gradient = both(wrong, label, ptr)
    want, slope = both(far, label, ptr)
    assert loss[0] == inf and loss[1] == want[1]
    assert_close(gradient, slope)
    # Equal infinities violate no margin.
    for x in (inf, -inf):
        logits = torch.tensor([x, x, 0.0, 0.5, 1.0], dtype=dtype)
        loss, gradient = both(logits, label, ptr, rho=0.0)
        assert loss[0] == (inf if x < 0 else 0)
        assert gradient[:3].tolist() == ([-0.5, 0, 0.5] if x < 0 else [0, 0, 0])
    # A term with weight 0 adds nothing, even if it is infinite.
    logits = torch.tensor([2.0, inf, 0.0, 0.5, 1.0], dtype=dtype)
    assert both(logits, 1 - label, ptr, rho=0.0)[0].isfinite().all()
    assert both(wrong, label, ptr, rho=0.0)[0][0] == inf


def test_upstream_gradients() -> None:
    """A gradient per question, strided or not, an expanded gradient, and zero."""
    logits, label, ptr = make(SIZES, padding=5)
    logits = logits.float()
    _, ones = both(logits, label, ptr)
    weight = torch.randn(len(SIZES))
    wanted = ones * torch.cat([weight, torch.zeros(1)]).repeat_interleave(torch.tensor([*SIZES, 5]))
    for grad in (weight, strided_like(weight)):
        _, got = both(strided_like(logits), strided_like(label), strided_like(ptr), grad)
        assert_close(got, wanted)
    _, got = both(logits, label, ptr, torch.zeros(len(SIZES)))
    assert not got.any()
    leaf = logits.clone().requires_grad_()
    fact_loss(leaf, label, ptr, rho=0.7, margin=1.0).sum().backward()
    assert torch.equal(leaf.grad, ones)


def test_no_gradient_is_computed_where_none_is_needed() -> None:
    logits, label, ptr = make([5, 4])
    assert not fact_loss(logits, label, ptr, rho=0.7, margin=1.0).requires_grad
    label.requires_grad_()
    assert not fact_loss(logits, label, ptr, rho=0.7, margin=1.0).requires_grad
    logits.requires_grad_()
    with torch.no_grad():
        assert not fact_loss(logits, label, ptr, rho=0.7, margin=1.0).requires_grad
    (got,) = torch.autograd.grad(
        fact_loss(logits, label, ptr, rho=0.7, margin=1.0).sum(), label, allow_unused=True
    )
    assert got is None


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_packing_and_fact_order_do_not_matter(sizes: list[int], seed: int) -> None:
    """A question has the same loss and gradient alone, and with its facts in another order."""
    logits, label, ptr = make(sizes, share=0.5, seed=seed)
    logits = logits.float()
    loss, gradient = both(logits, label, ptr)
    for b, (begin, end) in enumerate(zip(ptr[:-1].tolist(), ptr[1:].tolist(), strict=True)):
        facts = slice(begin, end)
        alone = both(logits[facts], label[facts], ptr_of([end - begin]))
        # Equal up to rounding: exp rounds differently in the last elements of a vector.
        torch.testing.assert_close(alone[0][0], loss[b])
        torch.testing.assert_close(alone[1], gradient[facts])
        order = torch.randperm(end - begin)
        mixed = both(logits[facts][order], label[facts][order], ptr_of([end - begin]))
        torch.testing.assert_close(mixed[0][0], loss[b])
        torch.testing.assert_close(mixed[1], gradient[facts][order])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 1)}, r"logits must have shape \[\*\], got \[3, 1\]"),
        ({"label": torch.zeros(4)}, r"label must have shape \[3\], got \[4\]"),
        ({"fact_ptr": torch.zeros(1, 1).int()}, r"fact_ptr must have shape \[\*\]"),
        ({"fact_ptr": torch.zeros(2).long()}, "fact_ptr must be int32"),
        ({"label": torch.zeros(3).long()}, "label must be floating point"),
        ({"logits": torch.zeros(3).int()}, "logits must be floating point"),
    ],
)
def test_wrong_arguments(change: dict[str, Tensor], message: str) -> None:
    arguments = {"logits": torch.zeros(3), "label": torch.zeros(3), "fact_ptr": ptr_of([3])}
    with pytest.raises(ValueError, match=f"fact_loss: {message}"):
        fact_loss(**{**arguments, **change}, rho=0.7, margin=1.0)
