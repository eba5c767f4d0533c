"""The kernels of fact_loss against the reference, with gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dragkit_kernels import fact_loss, fact_loss_ref
from dragkit_kernels.fact_head import loss_backward, loss_forward, loss_split
from dragkit_kernels.launch import Tile
from dragkit_kernels.testing import assert_close, fenced_allocations, strided_like

# The interpreter computes masked elements too.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Blocks are of 32 facts by 64 of the other kind, and walked 512 or 2,048 at a time.
SIZES = [[], [0], [0, 1, 5, 0, 31, 33, 100, 0], [600]]
FORWARD = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def make(
    sizes: list[int], device: torch.device, *, share: float = 0.3, padding: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and fact_ptr; padding holds NaN and positive labels."""
    generator = torch.Generator().manual_seed(sum(sizes))
    count = sum(sizes)
    logits = torch.full((count + padding,), math.nan)
    logits[:count] = 2 * torch.randn(count, generator=generator)
    label = torch.ones(count + padding)
    label[:count] = (torch.rand(count, generator=generator) < share).float()
    ptr = torch.tensor([0, *sizes]).cumsum(0).int()
    return logits.to(device), label.to(device), ptr.to(device)


def both(
    logits: Tensor, label: Tensor, ptr: Tensor, grad: Tensor | None = None, **options: object
) -> tuple[Tensor, Tensor]:
    """Loss and gradient by the kernels."""
    tried = logits.detach().requires_grad_()
    options = {"rho": 0.7, "margin": 1.0, **options}
    with fenced_allocations():
        loss = fact_loss(tried, label, ptr, backend="triton", **options)
        grad = torch.ones((), device=loss.device).expand(loss.shape) if grad is None else grad
        (got,) = torch.autograd.grad(loss, tried, grad)
    assert loss.dtype == torch.float32 and got.dtype == logits.dtype
    return loss.detach(), got


def check(
    logits: Tensor,
    label: Tensor,
    ptr: Tensor,
    *,
    max_facts: int | None = None,
    **options: object,
) -> None:
    exact = logits.double().requires_grad_()
    expected = fact_loss_ref(exact, label, ptr, **{"rho": 0.7, "margin": 1.0, **options})
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    weight = weight.to(logits.device)
    loss, gradient = both(logits, label, ptr, strided_like(weight), max_facts=max_facts, **options)
    assert_close(loss, expected, tolerance=FORWARD[logits.dtype])
    if expected.requires_grad:
        (want,) = torch.autograd.grad(expected, exact, weight.double())
        assert_close(gradient, want)
    assert not gradient[int(ptr[-1]) :].any()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", list(FORWARD), ids=str)
def test_matches_the_reference(device: torch.device, dtype: torch.dtype, sizes: list[int]) -> None:
    logits, label, ptr = make(sizes, device, padding=30)
    check(strided_like(logits.to(dtype)), strided_like(label.to(dtype)), strided_like(ptr))


@pytest.mark.parametrize("margin", [0.0, 0.3, 5.0, -1.0, 1e4])
@pytest.mark.parametrize("rho", [0.0, 0.4, 1.0])
def test_margins_and_shares(device: torch.device, rho: float, margin: float) -> None:
    logits, label, ptr = make([9, 40, 3], device)
    label[49:] = 0
    check(logits, label, ptr, rho=rho, margin=margin)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.98, 1.0])
def test_shares_of_positives(device: torch.device, share: float) -> None:
    check(*make([80, 31], device, share=share))


def test_kinds_that_meet_between_blocks(device: torch.device) -> None:
    logits, label, ptr = make([64, 100], device, share=0.0)
    label[16:48] = label[70:134] = 1
    check(logits, label, ptr)


def test_many_facts_and_positives(device: torch.device) -> None:
    logits, label, ptr = make([5000, 20], device, share=0.1)
    check(logits, label, ptr)


def test_max_facts_may_be_too_large(device: torch.device) -> None:
    check(*make([50, 20], device), max_facts=600)


def test_programs_that_take_several_blocks(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_split, "split_tile", lambda _: Tile(64, 4))
    monkeypatch.setattr(loss_forward, "pair_programs", lambda _: 2)
    monkeypatch.setattr(loss_backward, "PAIR_PROGRAMS", 1)
    check(*make([300, 7, 0, 49], device, padding=1100))


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_a_common_offset_costs_no_precision(device: torch.device, offset: float) -> None:
    logits, label, ptr = make([50, 90], device)
    check((logits + offset).float(), label, ptr, rho=0.0)


def test_ties_at_the_margin_cost_nothing(device: torch.device) -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 2.0, 0.0, -0.0, 0.0], device=device)
    label = torch.tensor([1.0, 0, 0, 1, 1, 0, 0], device=device)
    ptr = torch.tensor([0, 4, 7], dtype=torch.int32, device=device)
    for margin, rows in ((1.0, 4), (0.0, 7)):
        own = ptr[: 2 + rows // 7]
        loss, gradient = both(logits[:rows], label[:rows], own, rho=0.0, margin=margin)
        assert not loss.any() and not gradient.any()
    logits = (torch.arange(90, device=device) * 7 % 13 - 6).float() / 2
    label = (torch.arange(90, device=device) % 5 == 0).float()
    ptr = torch.tensor([0, 60, 90], dtype=torch.int32, device=device)
    for margin in (0.0, 0.5, 1.0):
        check(logits, label, ptr, margin=margin)


def test_confident_facts_keep_their_precision(device: torch.device) -> None:
    logits = torch.tensor([8.0, -8.0, 7.0, 15.0], device=device)
    label = torch.tensor([1.0, 0, 1, 1], device=device)
    ptr = torch.tensor([0, 3, 4], dtype=torch.int32, device=device)
    exact = logits.double().requires_grad_()
    want = fact_loss_ref(exact, label, ptr, rho=1.0, margin=1.0)
    loss, gradient = both(logits, label, ptr, rho=1.0)
    torch.testing.assert_close(loss.double(), want.detach(), rtol=2e-6, atol=0)
    (slope,) = torch.autograd.grad(want.sum(), exact)
    torch.testing.assert_close(gradient.double(), slope, rtol=2e-6, atol=0)


def test_huge_logits_and_margins_stay_finite(device: torch.device) -> None:
    logits = torch.tensor([1e4, -1e4, 3e4, -3e38, 3e37], device=device)
    label = torch.tensor([0.0, 1, 0, 0, 1], device=device)
    ptr = torch.tensor([0, 5], dtype=torch.int32, device=device)
    for margin in (1.0, 1e6, 1e30, -1e30):
        check(logits, label, ptr, margin=margin, rho=0.5)


def test_broken_logits_are_handled_as_by_the_other_path(device: torch.device) -> None:
    """NaN spoils its own question, and infinities count as the limit."""
    inf, nan = math.inf, math.nan
    firsts = [(nan, 0, 0), (0, nan, 0), (0, 0, nan), (inf, -inf, 0), (-inf, inf, 0), (0, inf, 0)]
    firsts += [(inf, inf, 0), (-inf, -inf, 0), (-inf, 0, 0), (inf, nan, -inf), (0.5, 0, 1)]
    logits = torch.tensor([*firsts, (nan, inf, 0)], device=device).flatten()
    label = torch.zeros(len(logits), device=device)
    label[0:-3:3] = 1
    ptr = torch.arange(0, len(logits) + 1, 3, dtype=torch.int32, device=device)
    for rho in (0.0, 0.7, 1.0):
        got = both(logits, label, ptr, rho=rho)
        tried = logits.clone().requires_grad_()
        loss = fact_loss(tried, label, ptr, rho=rho, margin=1.0, backend="torch")
        (slope,) = torch.autograd.grad(loss.sum(), tried)
        for x, y in zip(got, (loss.detach(), slope), strict=True):
            torch.testing.assert_close(x, y, equal_nan=True)
        nan_logit = logits.view(-1, 3).isnan().any(1)[:-1]
        assert torch.equal(got[0][:-1].isnan(), nan_logit)
        assert got[0][-1] == 0 and not got[1][-3:].any()


def test_the_backward_writes_only_its_own_rows(device: torch.device) -> None:
    """With numbers on, not only before, the end of what it reads."""
    gradient = torch.randn(90, device=device)
    ptr = torch.tensor([0, 30, 30, 80], dtype=torch.int32, device=device)
    grad = torch.randn(3, device=device)
    for rows in (80, 85):
        with fenced_allocations():
            got = torch.ops.dragkit.fact_loss_bwd(grad, gradient[:rows], ptr, 50, True)
        factor = torch.cat([grad, grad[:1] * 0])
        sizes = torch.tensor([30, 0, 50, rows - 80], device=device)
        assert torch.equal(got, gradient[:rows] * factor.repeat_interleave(sizes))


def test_zero_gradient_in_zero_out(device: torch.device) -> None:
    logits, label, ptr = make([50, 90], device)
    assert not both(logits, label, ptr, torch.zeros(2, device=device))[1].any()


def test_two_runs_are_bit_equal(device: torch.device) -> None:
    arguments = make([200, 90], device)
    runs = [both(*arguments) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_questions_do_not_depend_on_their_pack(device: torch.device) -> None:
    logits, label, ptr = make([70, 33, 65], device)
    loss, gradient = both(logits, label, ptr, max_facts=70)
    for b, (begin, end) in enumerate(zip(ptr[:-1].tolist(), ptr[1:].tolist(), strict=True)):
        mine = slice(begin, end)
        own = torch.tensor([0, end - begin], dtype=torch.int32, device=device)
        alone = both(logits[mine], label[mine], own)
        assert_close(alone[0], loss[b : b + 1].double(), tolerance=1e-6)
        assert torch.equal(alone[1], gradient[mine])
        order = torch.randperm(end - begin, device=device)
        mixed = both(logits[mine][order], label[mine][order], own)
        assert_close(mixed[0], loss[b : b + 1].double(), tolerance=1e-6)
        assert torch.equal(mixed[1], gradient[mine][order])
