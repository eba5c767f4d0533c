"""The packed causal convolution: the reference against F.conv1d, backends against the reference."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dragkit_kernels import blocks, causal_conv, causal_conv_ref, causal_conv_state
from dragkit_kernels.testing import (
    assert_close,
    fenced_allocations,
    gradients,
    leaves,
    positions,
    random,
    strided_like,
)
from tests.ops.cases import DTYPES, FORWARD, GRADIENT, kernels

# The interpreter also computes masked elements, which overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
LENGTHS = [1, 2, 3, 4, 5, 20]


def inputs(
    rows: int,
    columns: int,
    device: torch.device | str = "cpu",
    *,
    taps: int = 4,
    bias: bool = True,
) -> list[Tensor]:
    """[x, weight], and the bias if asked for."""
    shapes = [(rows, columns), (columns, taps), (columns,)]
    return [random(*s, seed=i).to(device) for i, s in enumerate(shapes[: 2 + bias])]


def with_bias(values: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight, *bias = values
    return x, weight, bias[0] if bias else None


def check(values: list[Tensor], seq_pos: Tensor, backend: str, grad: Tensor | None = None) -> None:
    """Compares output and gradients with float64, for trained and for frozen weights."""
    exact_args = leaves([x.double() for x in values])
    expected = causal_conv_ref(*with_bias(exact_args), seq_pos)
    if grad is None:
        grad = random(*expected.shape, seed=9).to(values[0])
    wanted = gradients(expected, exact_args, grad)
    for learned in (True, False):
        args = leaves(values) if learned else [values[0].detach().requires_grad_(), *values[1:]]
        inputs_with_grad = args if learned else args[:1]
        with fenced_allocations():
            actual = causal_conv(*with_bias(args), seq_pos, backend=backend)
            grads = gradients(actual, inputs_with_grad, grad)
        assert actual.dtype == values[0].dtype and actual.is_contiguous()
        assert_close(actual, expected, tolerance=FORWARD.get(actual.dtype, 1e-12))
        for name, leaf, got, want in zip(
            ("x", "weight", "bias"), inputs_with_grad, grads, wanted, strict=False
        ):
            assert got.dtype == leaf.dtype
            assert_close(got, want, tolerance=GRADIENT.get(got.dtype), name=name)


@pytest.fixture
def few_rows(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of 8 rows, because the interpreter is slow."""
    if backend == "triton":
        for name in ("forward", "backward"):
            monkeypatch.setattr(kernels(f"causal_conv.{name}"), "ROWS", 8)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 6])
def test_the_reference_is_the_formula(taps: int, bias: bool) -> None:
    """Compares with a loop over tokens, and with F.conv1d of each sequence alone."""
    values = [x.double() for x in inputs(sum(LENGTHS), 5, taps=taps, bias=bias)]
    x, weight, b = with_bias(values)
    base = torch.zeros(5).double() if b is None else b
    rows, singles = [], []
    for piece in x.split(LENGTHS):
        for index in range(len(piece)):
            read = range(min(taps, index + 1))
            rows.append(base + sum(weight[:, -1 - j] * piece[index - j] for j in read))
        padded = F.pad(piece.mT, (taps - 1, 0))[None]
        singles.append(F.conv1d(padded, weight[:, None], b, groups=5)[0].mT)
    actual = causal_conv_ref(x, weight, b, positions(LENGTHS))
    assert_close(actual, F.silu(torch.stack(rows)), tolerance=1e-12)
    assert_close(actual, F.silu(torch.cat(singles)), tolerance=1e-12)


@DTYPES
@pytest.mark.parametrize("columns", [1, 7, 64, 96, 257])
def test_dtypes_and_widths(
    backend: str, device: torch.device, columns: int, dtype: torch.dtype
) -> None:
    values = [x.to(dtype) for x in inputs(6, columns, device)]
    check(values, positions([1, 5], device), backend)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 6])
def test_numbers_of_taps(backend: str, device: torch.device, taps: int, bias: bool) -> None:
    values = inputs(9, 5, device, taps=taps, bias=bias)
    check(values, positions([2, 7], device), backend)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 1000])
def test_blocks_of_any_size(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences begin before, within and after the first rows of a block."""
    monkeypatch.setattr(blocks, "_BLOCK", 1)
    monkeypatch.setattr(blocks, "_ROWS", rows)
    lengths = [4, 1, 9, 2, 3, 1, 1, 12]
    for dtype in (torch.float64, torch.bfloat16):
        check([x.to(dtype) for x in inputs(33, 3)], positions(lengths), "torch")


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize(
    "lengths",
    [[8, 1], [7, 2], [6, 3], [5, 6], [9, 1, 1], [1] * 10, [8], [1], [0, 3, 0, 0, 2, 0]],
    ids=str,
)
def test_program_boundaries(backend: str, device: torch.device, lengths: list[int]) -> None:
    """Sequences begin before, within and after the first rows of a program, and end with it."""
    check(inputs(sum(lengths), 3, device), positions(lengths, device), backend)


@pytest.mark.triton
def test_a_program_of_full_size_and_one_that_sums_many_rows(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels("causal_conv.backward"), "MAX_SUM_PROGRAMS", 1)
    check(inputs(sum(LENGTHS), 3, device), positions(LENGTHS, device), "triton")


@pytest.mark.usefixtures("few_rows")
def test_packed_equals_alone(backend: str, device: torch.device) -> None:
    """The kernels give equal bits, because a program does not depend on where a sequence lies."""
    x, weight, bias = inputs(sum(LENGTHS), 5, device)
    grad = random(sum(LENGTHS), 5, seed=9).to(device)
    packed = leaves([x])[0]
    y = causal_conv(packed, weight, bias, positions(LENGTHS, device), backend=backend)
    grads = y, *torch.autograd.grad(y, packed, grad)
    pieces, rows = [], (leaves(list(x.split(LENGTHS))), grad.split(LENGTHS), LENGTHS)
    for alone, part, length in zip(*rows, strict=True):
        y = causal_conv(alone, weight, bias, positions([length], device), backend=backend)
        pieces.append((y, *torch.autograd.grad(y, alone, part)))
    for got, wanted in zip(grads, zip(*pieces, strict=True), strict=True):
        want = torch.cat(wanted)
        assert torch.equal(got, want) if backend == "triton" else torch.allclose(got, want)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize(
    ("row", "value"), [(0, math.inf), (4, math.nan), (5, math.nan), (7, math.nan), (10, math.inf)]
)
def test_nan_and_infinity_stay_in_their_sequence(
    backend: str, device: torch.device, row: int, value: float
) -> None:
    """A non-finite x or gradient reaches d_weight only through the taps that read it."""
    lengths = [1, 4, 3, 3]
    values, seq_pos = inputs(11, 3, device), positions(lengths, device)
    x, weight, bias = values
    clean = causal_conv(*values, seq_pos, backend=backend)
    ends = torch.tensor(lengths).cumsum(0)
    sequence = int((ends <= row).sum())
    outside = torch.ones(11, dtype=torch.bool, device=device)
    outside[int(ends[sequence]) - lengths[sequence] : int(ends[sequence])] = False
    grad = random(11, 3, seed=9).to(device)
    for with_nan in (x, grad):
        nan_x, nan_grad = x.clone(), grad.clone()
        (nan_x if with_nan is x else nan_grad)[row, 1] = value
        args = leaves([nan_x, weight, bias])
        y = causal_conv(*args, seq_pos, backend=backend)
        d_x, d_weight, _ = torch.autograd.grad(y, args, nan_grad)
        assert torch.equal(y[outside], clean[outside])
        assert d_x[outside].isfinite().all()
        exact_args = leaves([t.double() for t in (nan_x, weight, bias)])
        wanted = torch.autograd.grad(
            causal_conv_ref(*exact_args, seq_pos), exact_args, nan_grad.double()
        )[1]
        assert torch.equal(d_weight.isfinite(), wanted.isfinite())


def test_rows_of_padding_stand_alone(backend: str, device: torch.device) -> None:
    values = inputs(9, 5, device)
    seq_pos = torch.cat([positions([4], device), torch.zeros_like(positions([5], device))])
    check(values, seq_pos, backend)
    y = causal_conv(*values, seq_pos, backend=backend)
    values[0][4:] = math.nan
    x = values[0].requires_grad_()
    with_nan = causal_conv(*values, seq_pos, backend=backend)
    assert torch.equal(with_nan[:4], y[:4])
    (d_x,) = torch.autograd.grad(with_nan[:4].sum(), x)
    assert d_x[:4].isfinite().all()


def test_row_strides_and_expanded_gradients(backend: str, device: torch.device) -> None:
    x, weight, bias = inputs(7, 6, device)
    seq_pos = strided_like(positions([2, 5], device))
    wide = random(7, 30).to(device)
    wide[:, 11:17] = x
    for grad in (
        torch.ones((), device=device).expand(7, 6),
        random(6).to(device).expand(7, 6),
        strided_like(random(7, 6).to(device)),
        random(7, 20).to(device)[:, 3:9],
    ):
        check([wide[:, 11:17], weight, bias], seq_pos, backend, grad)
    check([strided_like(x), strided_like(weight), strided_like(bias)], seq_pos, backend)
    check([x[:1].expand(7, 6), weight, bias], seq_pos, backend)


@pytest.mark.triton
def test_a_slice_is_not_copied(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = kernels("causal_conv.forward")
    wide, weight, bias = random(5, 20).to(device), *inputs(5, 6, device)[1:]
    x, passed, plain = wide[:, 8:14], [], forward.row_strided
    monkeypatch.setattr(forward, "row_strided", lambda t: passed.append(plain(t)) or passed[-1])
    causal_conv(x, weight, bias, positions([5], device), backend="triton")
    assert [t.data_ptr() for t in passed] == [x.data_ptr()]


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
def test_empty_inputs(backend: str, device: torch.device, shape: tuple[int, int]) -> None:
    values = leaves(inputs(*shape, device))
    with fenced_allocations():
        y = causal_conv(*values, positions([shape[0]], device), backend=backend)
        grads = torch.autograd.grad(y.sum(), values)
    assert y.shape == shape
    for got, given in zip(grads, values, strict=True):
        assert got.shape == given.shape and not got.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3)}, r"causal_conv: x must have shape \[\*, \*\], got \[3\]"),
        ({"weight": torch.zeros(4, 4)}, r"weight must have shape \[5, \*\], got \[4, 4\]"),
        ({"weight": torch.zeros(5, 0)}, r"weight must have a tap, got shape \[5, 0\]"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \[5\], got \[4\]"),
        ({"seq_pos": torch.zeros(2).int()}, r"seq_pos must have shape \[3\], got \[2\]"),
        ({"seq_pos": torch.zeros(3).long()}, "seq_pos must be int32, got torch.int64"),
        ({"x": torch.zeros(3, 5).int()}, "x must be floating point"),
        ({"bias": torch.zeros(5).int()}, "bias must be floating point"),
    ],
)
def test_wrong_arguments_raise(change: dict, message: str) -> None:
    x, weight, bias, seq_pos = torch.zeros(3, 5), torch.zeros(5, 4), None, torch.zeros(3).int()
    arguments = {"x": x, "weight": weight, "bias": bias, "seq_pos": seq_pos}
    with pytest.raises(ValueError, match=message):
        causal_conv(**{**arguments, **change})


@pytest.mark.parametrize("width", [1, 2, 4, 5])
def test_state_is_what_transformers_keeps(width: int) -> None:
    """Transformers pads a short sequence on the left and keeps the last columns."""
    x, seq_pos = random(sum(LENGTHS), 6), positions(LENGTHS)
    last = (torch.tensor(LENGTHS).cumsum(0) - 1).int()
    state = causal_conv_state(x, seq_pos, last, width)
    expected = [F.pad(p.mT, (width, 0))[:, -width:] for p in x.split(LENGTHS)]
    assert torch.equal(state, torch.stack(expected)) and state.is_contiguous()
    with_nan = x.clone()
    with_nan[0] = math.nan  # a row of another sequence
    assert torch.equal(causal_conv_state(with_nan, seq_pos, last, width)[1:], state[1:])


def test_state_continues_the_convolution_of_transformers() -> None:
    conv = nn.Conv1d(6, 6, 4, groups=6, padding=3)
    x, new, weight = torch.randn(9, 6), torch.randn(2, 6), conv.weight.squeeze(1)
    y = causal_conv(x, weight, conv.bias, positions([9]))
    assert_close(y, F.silu(conv(x.mT[None])[..., :9])[0].mT, tolerance=2e-6)
    state = causal_conv_state(x, positions([2, 7]), torch.tensor([1, 8]).int(), 4)
    state = torch.cat([state[..., 1:], new[..., None]], -1)
    step = F.silu((state * weight).sum(-1) + conv.bias)
    longer = torch.cat([x[:2], new[:1], x[2:], new[1:]])
    whole = causal_conv(longer, weight, conv.bias, positions([3, 8]))
    assert_close(whole[[2, 10]], step, tolerance=2e-6)


def test_wrong_arguments_of_the_state_raise() -> None:
    x, seq_pos, last = torch.zeros(3, 5), torch.zeros(3).int(), torch.zeros(1).int()
    with pytest.raises(ValueError, match="causal_conv_state: width must be at least 1, got 0"):
        causal_conv_state(x, seq_pos, last, 0)
    with pytest.raises(ValueError, match="last_row must be int32"):
        causal_conv_state(x, seq_pos, last.long(), 4)
    with pytest.raises(ValueError, match=r"seq_pos must have shape \[3\], got \[2\]"):
        causal_conv_state(x, seq_pos[:2], last, 4)
    assert causal_conv_state(x, seq_pos, last[:0], 4).shape == (0, 5, 4)
