"""The kernels of causal_conv against the float64 reference and the PyTorch form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dragkit_kernels import causal_conv, causal_conv_ref
from dragkit_kernels.causal_conv import backward, forward
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

# Rows of a program where it does not matter to the compiler: few, since the interpreter is slow.
FEW_ROWS = 8


def positions(lengths: list[int], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(n) for n in [0, *lengths]]).int().to(device)


def inputs(
    rows: int, columns: int, device: torch.device, *, taps: int = 4, bias: bool = True
) -> list[Tensor]:
    """x, weight and perhaps bias."""
    shapes = [(rows, columns), (columns, taps), (columns,)]
    return [random(*s, seed=i).to(device) for i, s in enumerate(shapes[: 2 + bias])]


def with_bias(values: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight, *bias = values
    return x, weight, bias[0] if bias else None


def check(
    values: list[Tensor],
    position: Tensor,
    activation: str | None = "silu",
    grad: Tensor | None = None,
) -> None:
    """With learned weights and with frozen ones, which is another kernel."""
    exact = leaves([x.double() for x in values])
    expected = causal_conv_ref(*with_bias(exact), position, activation=activation)
    dtype = values[0].dtype
    if grad is None:
        grad = random(*expected.shape, seed=9).to(values[0].device, dtype)
    wanted = gradients(expected, exact, grad)
    for learned in (True, False):
        tried = leaves(values) if learned else [values[0].detach().requires_grad_(), *values[1:]]
        graded = tried if learned else tried[:1]
        with fenced_allocations():
            actual = causal_conv(
                *with_bias(tried), position, activation=activation, backend="triton"
            )
            found = gradients(actual, graded, grad)
        assert actual.dtype == dtype and actual.is_contiguous()
        assert_close(actual, expected, tolerance=FORWARD[dtype])
        for place, (got, given) in enumerate(zip(found, graded, strict=True)):
            assert got.dtype == given.dtype
            name = ("x", "weight", "bias")[place]
            assert_close(got, wanted[place], tolerance=GRADIENT[got.dtype], name=name)


@pytest.mark.parametrize("dtype", list(FORWARD), ids=str)
@pytest.mark.parametrize("columns", [1, 7, 64, 96, 257])
def test_dtypes_and_widths(device: torch.device, columns: int, dtype: torch.dtype) -> None:
    values = [x.to(dtype) for x in inputs(6, columns, device)]
    check(values, positions([1, 5], device))


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 6])
def test_taps(device: torch.device, taps: int, bias: bool, activation: str | None) -> None:
    values = inputs(9, 5, device, taps=taps, bias=bias)
    check(values, positions([2, 7], device), activation)


@pytest.mark.parametrize(
    "lengths",
    [[8, 1], [7, 2], [6, 3], [5, 6], [9, 1, 1], [1] * 10, [8]],
    ids=str,
)
def test_programs_meet(
    device: torch.device, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences begin in, before and after the first rows of a program, and end with it."""
    for module in (forward, backward):
        monkeypatch.setattr(module, "ROWS", FEW_ROWS)
    check(inputs(sum(lengths), 3, device), positions(lengths, device))


def test_a_program_of_full_size_and_one_that_sums_many_rows(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [1, 2, 3, 4, 5, 20]
    monkeypatch.setattr(backward, "SUM_PROGRAMS", 1)
    check(inputs(sum(lengths), 3, device), positions(lengths, device))


def test_packed_equals_alone(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: a program does not know where a sequence lies."""
    for module in (forward, backward):
        monkeypatch.setattr(module, "ROWS", FEW_ROWS)
    lengths = [1, 2, 3, 4, 5, 9]
    x, weight, bias = inputs(sum(lengths), 5, device)
    grad = random(sum(lengths), 5, seed=9).to(device)
    packed = leaves([x])[0]
    y = causal_conv(packed, weight, bias, positions(lengths, device), backend="triton")
    (d_x,) = torch.autograd.grad(y, packed, grad)
    begin = 0
    for length in lengths:
        rows = slice(begin, begin + length)
        alone = x[rows].clone().requires_grad_()
        single = causal_conv(alone, weight, bias, positions([length], device), backend="triton")
        assert torch.equal(y[rows], single)
        assert torch.equal(d_x[rows], torch.autograd.grad(single, alone, grad[rows])[0])
        begin += length


@pytest.mark.parametrize(("row", "bad"), [(0, math.inf), (4, math.nan), (7, math.nan)])
def test_a_bad_number_stays_in_its_sequence(
    device: torch.device, row: int, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In x and in the gradient; the sums of the weights get it only from taps that read it."""
    for module in (forward, backward):
        monkeypatch.setattr(module, "ROWS", FEW_ROWS)
    lengths = [1, 4, 3, 3]
    values, position = inputs(11, 3, device), positions(lengths, device)
    values[0][row, 1] = bad
    check(values, position, None)
    grad = random(11, 3, seed=9).to(device)
    grad[row, 2] = bad
    values = inputs(11, 3, device)
    check(values, position, grad=grad)
    x = values[0]
    clean = causal_conv(*values, position, backend="triton")
    x[row] = bad
    spoilt = causal_conv(*values, position, backend="triton")
    ends = torch.tensor(lengths).cumsum(0)
    sequence = int((ends <= row).sum())
    outside = torch.ones(11, dtype=torch.bool, device=device)
    outside[int(ends[sequence]) - lengths[sequence] : int(ends[sequence])] = False
    assert torch.equal(spoilt[outside], clean[outside])


def test_rows_of_padding_stand_alone(device: torch.device) -> None:
    values = inputs(9, 5, device)
    position = torch.cat([positions([4], device), torch.zeros_like(positions([5], device))])
    check(values, position)
    y = causal_conv(*values, position, backend="triton")
    values[0][4:] = math.nan
    assert torch.equal(causal_conv(*values, position, backend="triton")[:4], y[:4])


def test_rows_apart_strides_and_expanded_gradients(device: torch.device) -> None:
    x, weight, bias = inputs(7, 6, device)
    position = strided_like(positions([2, 5], device))
    wide = random(7, 30).to(device)
    wide[:, 11:17] = x
    one = torch.ones((), device=device)
    grads = (
        one.expand(7, 6),
        random(6).to(device).expand(7, 6),
        strided_like(random(7, 6).to(device)),
        random(7, 20).to(device)[:, 3:9],
    )
    for grad in grads:
        check([wide[:, 11:17], weight, bias], position, grad=grad)
    check([strided_like(x), strided_like(weight), strided_like(bias)], position)
    same = x[:1].expand(7, 6)
    check([same, weight, bias], position)


def test_a_slice_is_not_copied(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    wide, weight, bias = random(5, 20).to(device), *inputs(5, 6, device)[1:]
    x = wide[:, 8:14]
    seen = []
    plain = forward.with_unit_stride
    monkeypatch.setattr(forward, "with_unit_stride", lambda t: seen.append(plain(t)) or seen[-1])
    causal_conv(x, weight, bias, positions([5], device), backend="triton")
    assert [t.data_ptr() for t in seen] == [x.data_ptr()]


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
def test_nothing(device: torch.device, shape: tuple[int, int]) -> None:
    values = leaves(inputs(*shape, device))
    with fenced_allocations():
        y = causal_conv(*values, positions([shape[0]], device), backend="triton")
        found = torch.autograd.grad(y.sum(), values)
    assert y.shape == shape
    for got, given in zip(found, values, strict=True):
        assert got.shape == given.shape and not got.any()


def test_no_gradient_in_none_out(device: torch.device) -> None:
    values, position = leaves(inputs(9, 5, device)), positions([4, 5], device)
    y = causal_conv(*values, position, backend="triton")
    assert not any(g.any() for g in gradients(y, values, torch.zeros_like(y)))


def test_gradients_nobody_wants_are_not_computed(device: torch.device) -> None:
    values, position = inputs(9, 5, device), positions([4, 5], device)
    grad = random(9, 5, seed=9).to(device)
    bwd = torch.ops.dragkit.causal_conv_bwd
    every = bwd(grad, *values, position, True, [True] * 3, True)
    for mask in ([True, False, False], [False, True, False], [False, False, True], [False] * 3):
        with fenced_allocations():
            found = bwd(grad, *values, position, True, mask, True)
        for got, want, wanted in zip(found, every, mask, strict=True):
            assert torch.equal(got, want) if wanted else got.numel() == 0


def test_two_runs_are_bit_equal(device: torch.device) -> None:
    values, position = leaves(inputs(34, 3, device)), positions([30, 4], device)
    grad = random(34, 3, seed=9).to(device)
    runs = []
    for _ in range(2):
        y = causal_conv(*values, position, backend="triton")
        runs.append((y, *torch.autograd.grad(y, values, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_agrees_with_the_pytorch_form(device: torch.device) -> None:
    values, position = inputs(9, 5, device), positions([4, 5], device)
    plain = causal_conv(*values, position, backend="torch")
    assert_close(causal_conv(*values, position, backend="triton"), plain, tolerance=1e-6)
