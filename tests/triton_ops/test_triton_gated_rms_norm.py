"""The kernels of gated_rms_norm against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dragkit_kernels import gated_rms_norm, gated_rms_norm_ref
from dragkit_kernels.gated_rms_norm import backward, forward
from dragkit_kernels.testing import (
    assert_close,
    fenced_allocations,
    gradients,
    leaves,
    strided_like,
)
from tests.triton_ops.cases import FORWARD, GRADIENT, random

# The interpreter computes masked elements too.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

EPS = 1e-5
GATED = pytest.mark.parametrize("gated", [True, False], ids=["gate", "none"])


def inputs(rows: int, columns: int, device: torch.device, *, gated: bool = True) -> list[Tensor]:
    """y, weight and perhaps a gate."""
    values = [random(rows, columns), 1 + 0.3 * random(columns, seed=1)]
    values += [random(rows, columns, seed=2)] if gated else []
    return [x.to(device) for x in values]


def in_order(values: list[Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
    y, weight, *gate = values
    return y, gate[0] if gate else None, weight


def check(
    values: list[Tensor], groups: int = 1, grad: Tensor | None = None, *, eps: float = EPS
) -> None:
    """With a learned weight and with a frozen one."""
    exact = leaves([x.double() for x in values])
    expected = gated_rms_norm_ref(*in_order(exact), groups=groups, eps=eps)
    dtype = values[0].dtype
    if grad is None:
        grad = random(*expected.shape, seed=9).to(values[0].device, dtype)
    wanted = gradients(expected, exact, grad)
    for learned in (True, False):
        tried = leaves(values)
        tried[1].requires_grad_(learned)
        with fenced_allocations():
            actual = gated_rms_norm(*in_order(tried), groups=groups, eps=eps, backend="triton")
            graded = [x for x in tried if x.requires_grad]
            found = gradients(actual, graded, grad)
        assert actual.dtype == dtype and actual.is_contiguous()
        assert_close(actual, expected, tolerance=FORWARD[dtype])
        places = [i for i, x in enumerate(tried) if x.requires_grad]
        for got, place in zip(found, places, strict=True):
            assert got.dtype == values[place].dtype
            name = ("y", "weight", "gate")[place]
            assert_close(got, wanted[place], tolerance=GRADIENT[got.dtype], name=name)


@GATED
@pytest.mark.parametrize("dtype", list(FORWARD), ids=str)
@pytest.mark.parametrize(
    ("columns", "groups"),
    [(2, 1), (7, 1), (64, 4), (96, 2), (128, 1), (129, 1), (257, 1), (1024, 2), (2688, 1)],
    ids=str,
)
def test_dtypes_and_widths(
    device: torch.device, columns: int, groups: int, dtype: torch.dtype, gated: bool
) -> None:
    values = inputs(5, columns, device, gated=gated)
    check([x.to(dtype) for x in values], groups)


def test_a_group_of_one_column_is_its_sign(device: torch.device) -> None:
    y = torch.tensor([[3.0, -2.0, 0.0, 5.0]], device=device)
    signs = gated_rms_norm(y, None, torch.ones_like(y[0]), groups=4, backend="triton")
    assert_close(signs, y.sign(), tolerance=1e-5)
    y = random(3, 1).to(device)
    signs = gated_rms_norm(y, None, torch.ones_like(y[0]), backend="triton")
    assert_close(signs, y.sign(), tolerance=1e-3)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 32, 33, 70])
def test_programs_meet(device: torch.device, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of 8 rows at a time walks down 32, and one with sums a third of all."""
    monkeypatch.setattr(backward, "SUM_PROGRAMS", 3)
    check(inputs(rows, 6, device), 2)


@pytest.mark.parametrize("rows", [8, 9, 17])
def test_programs_of_wide_groups_meet(
    device: torch.device, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backward, "SUM_PROGRAMS", 2)
    check(inputs(rows, 260, device))
    check(inputs(rows // 2, 600, device))


@GATED
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_number_stays_in_its_group(device: torch.device, bad: float, gated: bool) -> None:
    for place in range(0, 3 if gated else 1, 2):
        values = inputs(9, 12, device, gated=gated)
        values[place][1, 5] = bad
        check(values, 3)
    grad = random(9, 12, seed=9).to(device)
    grad[8, 4] = bad
    values = leaves(inputs(9, 12, device, gated=gated))
    out = gated_rms_norm(*in_order(values), groups=3, backend="triton")
    inside = torch.zeros(9, 12, dtype=torch.bool, device=device)
    inside[8, 4:8] = True
    d_y, d_weight, *d_gate = gradients(out, values, grad)
    for got in (d_y, *d_gate):
        assert got[~inside].isfinite().all() and not got[inside].isfinite().any()
    assert (~d_weight.isfinite()).nonzero().flatten().tolist() == [4]


def test_no_epsilon(device: torch.device) -> None:
    """Rows and columns that are not there would have a scale of infinity."""
    check(inputs(9, 10, device), 2, eps=0.0)


def test_zeros_and_large_numbers(device: torch.device) -> None:
    y = torch.zeros(3, 8, device=device)
    y[1], y[2] = 1e15, 1e-25
    y.requires_grad_()
    out = gated_rms_norm(y, None, torch.ones_like(y[0]), eps=EPS, backend="triton")
    assert not out[0].any() and torch.allclose(out[1], torch.ones_like(out[1]))
    (d_y,) = torch.autograd.grad(out.sum(), y)
    assert d_y.isfinite().all()


def test_rows_apart_strides_and_expanded_gradients(device: torch.device) -> None:
    y, weight, gate = inputs(7, 10, device)
    wide = torch.cat([random(7, 3).to(device), y, gate], 1)
    one = torch.ones((), device=device)
    grads = (
        one.expand(7, 10),
        random(7, 1).to(device).expand(7, 10),
        strided_like(random(7, 10).to(device)),
        random(7, 20).to(device)[:, 3:13],
    )
    for grad in grads:
        check([wide[:, 3:13], weight, wide[:, 13:]], 5, grad)
    check([strided_like(y), strided_like(weight), strided_like(gate)], 5)
    check([y[:1].expand(7, 10), weight, gate], 5)


def test_slices_are_not_copied(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    wide, weight = random(5, 20).to(device), random(6).to(device)
    given = wide[:, 2:8], wide[:, 9:15]
    seen = []
    plain = forward.with_unit_stride
    monkeypatch.setattr(forward, "with_unit_stride", lambda t: seen.append(plain(t)) or seen[-1])
    gated_rms_norm(*given, weight, backend="triton")
    assert [t.data_ptr() for t in seen] == [t.data_ptr() for t in given]


@GATED
@pytest.mark.parametrize("shape", [(0, 6), (4, 0), (0, 0)])
def test_nothing(device: torch.device, shape: tuple[int, int], gated: bool) -> None:
    values = leaves(inputs(*shape, device, gated=gated))
    with fenced_allocations():
        out = gated_rms_norm(*in_order(values), groups=2, backend="triton")
        found = torch.autograd.grad(out.sum(), values)
    assert out.shape == shape
    for got, given in zip(found, values, strict=True):
        assert got.shape == given.shape and not got.any()


def test_no_gradient_in_none_out(device: torch.device) -> None:
    values = leaves(inputs(9, 10, device))
    out = gated_rms_norm(*in_order(values), groups=2, backend="triton")
    assert not any(g.any() for g in gradients(out, values, torch.zeros_like(out)))


def test_gradients_nobody_wants_are_not_computed(device: torch.device) -> None:
    values = in_order(inputs(9, 10, device))
    grad = random(9, 10, seed=9).to(device)
    bwd = torch.ops.dragkit.gated_rms_norm_bwd
    every = bwd(grad, *values, 2, EPS, [True] * 3, True)
    for mask in ([True, False, False], [False, True, False], [False, False, True], [False] * 3):
        with fenced_allocations():
            found = bwd(grad, *values, 2, EPS, mask, True)
        for got, want, wanted in zip(found, every, mask, strict=True):
            assert torch.equal(got, want) if wanted else got.numel() == 0


def test_two_runs_are_bit_equal(device: torch.device) -> None:
    values = leaves(inputs(70, 10, device))
    grad = random(70, 10, seed=9).to(device)
    runs = []
    for _ in range(2):
        out = gated_rms_norm(*in_order(values), groups=2, backend="triton")
        runs.append((out, *torch.autograd.grad(out, values, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_group_that_no_tile_holds(device: torch.device) -> None:
    y = torch.ones(1, 4097, device=device)
    with pytest.raises(ValueError, match="groups of up to 4096 columns, got 4097; use backend"):
        gated_rms_norm(y, None, y[0], backend="triton")
