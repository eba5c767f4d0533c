"""The kernels of ssd_scan and ssd_state against the float64 PyTorch path, with every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dragkit_kernels import ssd_scan, ssd_state
from dragkit_kernels.ssd_scan import backward
from dragkit_kernels.testing import (
    assert_close,
    fenced_allocations,
    gradients,
    leaves,
    strided_like,
)
from tests.triton_ops.cases import FORWARD, GRADIENT

# The interpreter computes masked elements too.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NAMES = ("x", "dt", "rate", "into", "out_of", "skip")
# Around chunks of 32 and of 64 rows.
LENGTHS = (1, 33, 2, 28, 65, 4)


def positions(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths]).int().to(device)


def make_inputs(
    rows: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """x, dt, rate, into, out_of, skip; the small ones are float32."""
    heads, width, groups, states = shape
    generator = torch.Generator().manual_seed(rows + width)
    sizes = (
        *((rows, heads, width), (rows, heads), (heads,)),
        *((rows, groups, states), (rows, groups, states), (heads,)),
    )
    drawn = [torch.randn(s, generator=generator) for s in sizes]
    drawn[1] = F.softplus(drawn[1] - 2)
    drawn[2] = -3 * torch.rand(heads, generator=generator) - 0.02
    drawn[3], drawn[4] = (t / max(states, 1) ** 0.5 for t in drawn[3:5])
    low = ("x", "into", "out_of")
    return [
        t.to(device, dtype if name in low else torch.float32)
        for name, t in zip(NAMES, drawn, strict=True)
    ]


def scan(inputs: list[Tensor], position: Tensor) -> Tensor:
    return ssd_scan(*inputs, position, backend="triton")


def check(
    inputs: list[Tensor],
    position: Tensor,
    grad: Tensor | None = None,
    *,
    tolerance: float | None = None,
) -> None:
    """Result, gradients and states of kernels and float64; every buffer is filled."""
    exact, tried = leaves([t.double() for t in inputs]), leaves(inputs)
    expected = ssd_scan(*exact, position, backend="torch")
    if grad is None:
        grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
        grad = grad.to(expected.device, inputs[0].dtype)
    last = (position == 0).nonzero().flatten()[1:] - 1
    last = torch.cat([last, last.new_tensor([len(position) - 1])]).flip(0)
    with fenced_allocations():
        actual = scan(tried, position)
        got = gradients(actual, tried, grad)
        state = ssd_state(*inputs[:4], position, last, backend="triton")
    assert actual.dtype == inputs[0].dtype
    limit = tolerance or FORWARD[actual.dtype]
    assert_close(actual, expected, name="y", tolerance=limit)
    want_state = ssd_state(*(t.double() for t in inputs[:4]), position, last, backend="torch")
    assert state.dtype == torch.float32
    assert_close(state, want_state, name="state", tolerance=limit)
    wanted = gradients(expected, exact, grad.double())
    limit = tolerance or GRADIENT[actual.dtype]
    for name, t, g, want in zip(NAMES, inputs, got, wanted, strict=True):
        assert g.dtype == t.dtype
        if name == "rate":
            # A sum over all rows that may cancel: its error is one of its terms.
            scale = (wanted[1] * exact[1]).abs().sum(0)
            assert ((g - want).abs() <= limit * scale + 1e-9).all(), (g, want, scale)
        else:
            assert_close(g, want, name=f"d{name}", tolerance=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_gradient(device: torch.device, dtype: torch.dtype) -> None:
    check(make_inputs(133, (2, 7, 1, 5), dtype, device), positions(LENGTHS, device))


def test_one_sequence_of_many_chunks(device: torch.device) -> None:
    for dtype in (torch.float32, torch.float16):
        check(make_inputs(133, (1, 3, 1, 5), dtype, device), positions((133,), device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 64, 1, 96), (1, 96, 1, 64), (1, 7, 1, 257)], ids=str
)
def test_widths(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(make_inputs(40, shape, dtype, device), positions((35, 5), device))


def test_groups_of_one_head_and_one_group(device: torch.device) -> None:
    for shape in ((2, 5, 2, 4), (4, 5, 2, 4)):
        check(make_inputs(20, shape, torch.float32, device), positions((10, 10), device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strides(device: torch.device, dtype: torch.dtype) -> None:
    values, position = make_inputs(45, (2, 3, 2, 5), dtype, device), positions((40, 5), device)
    one = torch.ones((), dtype=dtype, device=device).expand(values[0].shape)
    check([strided_like(t) for t in values], strided_like(position), one)
    # Parts of one row, as a convolution leaves them: the kernels step over the others.
    mixed = torch.randn(45, 6 + 10 + 10).to(device, dtype)
    x, into, out_of = mixed.split([6, 10, 10], 1)
    parts = x.unflatten(1, (2, 3)), into.unflatten(1, (2, 5)), out_of.unflatten(1, (2, 5))
    grad = torch.randn(45, 30).to(device, dtype)[:, 5:11].unflatten(1, (2, 3))
    check([parts[0], values[1], values[2], *parts[1:], values[5]], position, grad)


@pytest.mark.parametrize("places", [(0,), (3, 4)], ids=str)
def test_mixed_precision(device: torch.device, places: tuple[int, ...]) -> None:
    """Of several dtypes, products take float32: only a result of low precision is rounded."""
    values = make_inputs(40, (1, 5, 1, 4), torch.float32, device)
    position = positions((40,), device)
    for place in places:
        values[place] = values[place].half()
    grad = torch.randn(40, 1, 5).to(device, values[0].dtype)
    check(values, position, grad, tolerance=2e-3)


@pytest.mark.parametrize("place", range(6), ids=NAMES)
def test_each_gradient_alone(device: torch.device, place: int) -> None:
    values = make_inputs(40, (1, 3, 1, 5), torch.float32, device)
    position = positions((35, 5), device)
    every = leaves(values)
    grad = torch.randn(values[0].shape).to(device)
    want = gradients(scan(every, position), every, grad)[place]
    alone = [t.detach() for t in values]
    alone[place].requires_grad_()
    with fenced_allocations():
        (got,) = gradients(scan(alone, position), [alone[place]], grad)
    assert torch.equal(got, want)
    mask = [i == place for i in range(6)]
    found = backward.ssd_scan_bwd(grad, *values, position, mask)
    assert [t.numel() > 0 for t in found] == mask


def test_a_zero_gradient_gives_zeros(device: torch.device) -> None:
    tried = leaves(make_inputs(40, (1, 3, 1, 5), torch.float32, device))
    y = scan(tried, positions((35, 5), device))
    assert not any(g.any() for g in gradients(y, tried, torch.zeros_like(y)))


def test_a_pack_equals_its_sequences_alone(device: torch.device) -> None:
    """And rows of padding behind them, each a sequence, change nothing."""
    lengths = (20, 1, 45)
    values = make_inputs(70, (1, 3, 1, 5), torch.float32, device)
    position = positions((*lengths, *([1] * 4)), device)
    together = leaves(values)
    y = scan(together, position)
    grad = torch.randn(y.shape).to(device)
    grad[66:] = 0
    got = gradients(y, together, grad)
    assert y.isfinite().all()
    for name, g in zip(NAMES, got, strict=True):
        assert name in ("rate", "skip") or not g[66:].any(), name
    begin = 0
    sums = [0, 0]
    for n in lengths:
        rows = slice(begin, begin + n)
        own = leaves([t[rows] if len(t) == 70 else t for t in values])
        part = scan(own, positions((n,), device))
        assert_close(y[rows], part.double(), tolerance=2e-6)
        alone = gradients(part, own, grad[rows])
        for name, g, want in zip(NAMES, got, alone, strict=True):
            if name not in ("rate", "skip"):
                assert_close(g[rows], want.double(), name=name, tolerance=1e-5)
        sums = [a + b for a, b in zip(sums, (alone[2], alone[5]), strict=True)]
        begin += n
    assert_close(got[2], sums[0].double(), name="rate", tolerance=2e-5)
    assert_close(got[5], sums[1].double(), name="skip", tolerance=2e-5)


def test_no_rows_and_no_heads_width_or_states(device: torch.device) -> None:
    for rows, shape in ((0, (4, 3, 2, 5)), (9, (4, 0, 2, 5)), (9, (4, 3, 2, 0))):
        values = make_inputs(rows, shape, torch.float32, device)
        position = torch.arange(rows, dtype=torch.int32, device=device)
        tried = leaves(values)
        with fenced_allocations():
            y = scan(tried, position)
            got = gradients(y, tried, torch.ones_like(y))
        exact = leaves([t.double() for t in values])
        expected = ssd_scan(*exact, position)
        assert_close(y, expected)
        for g, want in zip(got, gradients(expected, exact, torch.ones_like(y)), strict=True):
            assert_close(g, want)
        none = torch.zeros(0, dtype=torch.int64, device=device)
        assert ssd_state(*values[:4], position, none, backend="triton").shape[0] == 0


@pytest.mark.parametrize("step", [0.0, 30.0])
def test_extreme_steps(device: torch.device, step: float) -> None:
    values = make_inputs(45, (1, 3, 1, 5), torch.float32, device)
    position = positions((40, 5), device)
    values[1].fill_(step)
    check(values, position)
    # Small steps between large ones: their decays are differences of large sums.
    values[1][::3] = 0.1
    check(values, position, tolerance=1e-3)


@pytest.mark.parametrize(
    ("place", "value", "dtype"),
    [
        (0, float("nan"), torch.float32),
        (1, float("inf"), torch.float16),
        (3, float("inf"), torch.float32),
        (4, float("nan"), torch.float16),
        (6, float("nan"), torch.float32),
    ],
    ids=["x", "dt", "into", "out_of", "grad"],
)
def test_what_is_not_finite_stays_in_its_sequence(
    device: torch.device, place: int, value: float, dtype: torch.dtype
) -> None:
    """Neighbours lie in the same chunk; the sequence begins in one chunk and ends in another."""
    lengths = (10, 60, 10)
    rows = sum(lengths)
    values = make_inputs(rows, (1, 3, 1, 5), dtype, device)
    position = positions(lengths, device)
    grad = torch.randn(values[0].shape).to(device, dtype)
    last = torch.tensor([9, 69, rows - 1], device=device)
    clean = leaves(values)
    wanted = scan(clean, position)
    want = gradients(wanted, clean, grad)
    states = ssd_state(*values[:4], position, last, backend="triton")
    (values + [grad])[place][14] = value
    tried = leaves(values)
    y = scan(tried, position)
    got = gradients(y, tried, grad)
    others = torch.cat([torch.arange(14), torch.arange(70, rows)]).to(device)
    assert torch.equal(y[others], wanted[others])
    if place != 6:
        assert not y[14].isfinite().all()
    if place in (0, 1, 3):
        assert not y[69].isfinite().all() and not y[15].isfinite().all()
        state = ssd_state(*values[:4], position, last, backend="triton")
        assert torch.equal(state[[0, 2]], states[[0, 2]]) and not state[1].isfinite().all()
    others = torch.cat([torch.arange(10), torch.arange(70, rows)]).to(device)
    spoiled = False
    for name, g, w in zip(NAMES, got, want, strict=True):
        if name not in ("rate", "skip"):
            assert torch.equal(g[others], w[others]), name
            spoiled = spoiled or not g[14].isfinite().all()
    assert spoiled


def test_two_runs_are_bit_equal(device: torch.device) -> None:
    values = make_inputs(40, (1, 7, 1, 5), torch.float32, device)
    position = positions((35, 5), device)
    runs = []
    for _ in range(2):
        tried = leaves(values)
        y = scan(tried, position)
        runs.append((y, *gradients(y, tried, torch.ones_like(y))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
