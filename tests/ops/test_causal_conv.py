"""The packed causal convolution against loops, F.conv1d and the library's own layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dragkit_kernels import blocks, causal_conv, causal_conv_ref, causal_conv_state
from dragkit_kernels.testing import assert_close, gradients, leaves, strided_like

LENGTHS = [1, 2, 3, 4, 5, 64]
FORWARD = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
BOTH = pytest.mark.parametrize("function", [causal_conv, causal_conv_ref])
ACTIVATIONS = pytest.mark.parametrize("activation", ["silu", None])


def positions(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(n) for n in [0, *lengths]]).int()


def inputs(lengths: list[int], columns: int, taps: int, *, bias: bool = True) -> list[Tensor]:
    """x, weight and perhaps bias."""
    shapes = [(sum(lengths), columns), (columns, taps), (columns,)]
    return [torch.randn(shape) for shape in shapes[: 2 + bias]]


def with_bias(values: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight, *bias = values
    return x, weight, bias[0] if bias else None


def loop_conv(values: list[Tensor], lengths: list[int], activation: str | None) -> Tensor:
    """Token by token, in float64."""
    x, weight, bias = with_bias(values)
    rows = []
    begin = 0
    for length in lengths:
        for place in range(length):
            y = torch.zeros_like(weight[:, 0]) if bias is None else bias
            for back in range(min(weight.shape[1], place + 1)):
                y = y + weight[:, -1 - back] * x[begin + place - back]
            rows.append(F.silu(y) if activation else y)
        begin += length
    return torch.stack(rows) if rows else x.new_zeros(0, x.shape[1])


def single_convs(values: list[Tensor], lengths: list[int], activation: str | None) -> Tensor:
    """F.conv1d of each sequence alone."""
    x, weight, bias = with_bias(values)
    pieces = []
    for piece in x.split(lengths):
        padded = F.pad(piece.mT, (weight.shape[1] - 1, 0))[None]
        pieces.append(F.conv1d(padded, weight[:, None], bias, groups=x.shape[1])[0].mT)
    y = torch.cat(pieces)
    return F.silu(y) if activation else y


def check(
    values: list[Tensor],
    lengths: list[int],
    activation: str | None = "silu",
    expect: Callable = loop_conv,
    function: Callable = causal_conv,
    grad: Tensor | None = None,
) -> Tensor:
    tried, exact = leaves(values), leaves([x.double() for x in values])
    actual = function(*with_bias(tried), positions(lengths), activation=activation)
    expected = expect(exact, lengths, activation)
    assert actual.dtype == values[0].dtype
    assert_close(actual, expected, tolerance=FORWARD[actual.dtype])
    if grad is None:
        grad = torch.randn(actual.shape).to(actual.dtype)
    found = gradients(actual, tried, grad)
    for got, want, given in zip(found, gradients(expected, exact, grad), values, strict=True):
        assert got.dtype == given.dtype
        assert_close(got, want)
    return actual


@BOTH
@ACTIVATIONS
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
def test_matches_the_loop(
    taps: int, bias: bool, activation: str | None, function: Callable
) -> None:
    lengths = [3, 1, 1, 7, 2, 11]
    values = [x.double() for x in inputs(lengths, 5, taps, bias=bias)]
    check(values, lengths, activation, function=function)


@BOTH
@pytest.mark.parametrize("dtype", list(FORWARD), ids=str)
@pytest.mark.parametrize("columns", [1, 7, 64, 96, 257])
def test_dtypes_and_widths(columns: int, dtype: torch.dtype, function: Callable) -> None:
    lengths = [*LENGTHS, 30]
    values = [x.to(dtype) for x in inputs(lengths, columns, 4)]
    check(values, lengths, expect=single_convs, function=function)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 1000])
def test_blocks_of_any_size(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences begin before, in and after a block's first rows."""
    monkeypatch.setattr(blocks, "_BLOCK", 1)
    monkeypatch.setattr(blocks, "_ROWS", rows)
    lengths = [4, 1, 9, 2, 3, 1, 1, 12]
    values = [x.double() for x in inputs(lengths, 3, 4)]
    check(values, lengths)
    check([x.bfloat16() for x in values], lengths)


@ACTIVATIONS
def test_packed_equals_alone(activation: str | None) -> None:
    x, weight, bias = leaves(inputs(LENGTHS, 12, 4))
    grad = torch.randn(x.shape)
    packed = causal_conv(x, weight, bias, positions(LENGTHS), activation=activation)
    (d_x,) = torch.autograd.grad(packed, x, grad)
    begin = 0
    for length in LENGTHS:
        rows = slice(begin, begin + length)
        alone = x.detach()[rows].requires_grad_()
        y = causal_conv(alone, weight, bias, positions([length]), activation=activation)
        assert_close(packed[rows], y, tolerance=1e-6)
        (d_alone,) = torch.autograd.grad(y, alone, grad[rows])
        assert_close(d_x[rows], d_alone, tolerance=1e-6)
        begin += length


def test_matches_the_layer_of_the_library() -> None:
    """NemotronHMamba2Mixer's own Conv1d followed by silu."""
    conv = nn.Conv1d(20, 20, 4, groups=20, padding=3)
    x = torch.randn(17, 20)
    expected = F.silu(conv(x.mT[None])[..., :17])[0].mT
    actual = causal_conv(x, conv.weight.squeeze(1), conv.bias, positions([17]))
    assert_close(actual, expected, tolerance=2e-6)


def test_rows_of_padding_stand_alone() -> None:
    x, weight, bias = inputs([6, 5], 8, 4)
    position = torch.cat([positions([6]), torch.zeros(5).int()])
    x[6:] = math.nan
    x.requires_grad_()
    y = causal_conv(x, weight, bias, position)
    assert y[:6].isfinite().all()
    (d_x,) = torch.autograd.grad(y[:6].sum(), x)
    assert d_x[:6].isfinite().all()
    with torch.no_grad():
        x[6:] = torch.randn(5, 8)
    y = causal_conv(x, weight, bias, position)
    assert_close(y[6:], F.silu(x[6:] * weight[:, -1] + bias), tolerance=2e-6)


@BOTH
@ACTIVATIONS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_number_stays_in_its_sequence(
    bad: float, activation: str | None, function: Callable
) -> None:
    lengths = [3, 5, 2, 1, 6]
    x, weight, bias = inputs(lengths, 4, 4)
    rows = torch.arange(17)
    for row, inside in ((2, rows < 3), (7, (rows >= 3) & (rows < 8)), (10, rows == 10)):
        spoilt, grad = x.clone(), torch.randn(x.shape)
        spoilt[row] = bad
        tried = spoilt.requires_grad_()
        y = function(tried, weight, bias, positions(lengths), activation=activation)
        clean = function(x, weight, bias, positions(lengths), activation=activation)
        assert torch.equal(y[~inside], clean[~inside])
        (d_x,) = torch.autograd.grad(y, tried, grad)
        assert d_x[~inside].isfinite().all()
        grad[row] = bad
        tried = x.clone().requires_grad_()
        y = function(tried, weight, bias, positions(lengths), activation=activation)
        (d_x,) = torch.autograd.grad(y, tried, grad)
        assert d_x[~inside].isfinite().all() and not d_x[row].isfinite().any()


@BOTH
def test_a_bad_number_reaches_only_the_taps_that_read_it(function: Callable) -> None:
    """The last token of a sequence is read by the tap for the token itself alone."""
    lengths = [5, 6]
    x, weight, bias = inputs(lengths, 3, 4)
    x[4, 1] = math.nan
    weight.requires_grad_()
    y = function(x, weight, bias, positions(lengths), activation=None)
    (d_weight,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    assert d_weight.isnan().nonzero().tolist() == [[1, 3]]
    grad = torch.ones_like(y)
    grad[5, 2] = math.nan
    y = function(x.nan_to_num(), weight, bias, positions(lengths), activation=None)
    (d_weight,) = torch.autograd.grad(y, weight, grad)
    assert d_weight.isnan().nonzero().tolist() == [[2, 3]]


@pytest.mark.parametrize("lengths", [[], [1], [2], [1] * 9, [0, 3, 0, 0, 2, 0]], ids=str)
def test_few_rows(lengths: list[int]) -> None:
    values = inputs(lengths, 6, 4)
    if sum(lengths):
        check(values, lengths)
    else:
        x, weight, bias = leaves(values)
        y = causal_conv(x, weight, bias, positions(lengths))
        d_x, d_weight, d_bias = torch.autograd.grad(y.sum(), [x, weight, bias])
        assert y.shape == d_x.shape == (0, 6) and not d_weight.any() and not d_bias.any()
    none = causal_conv(values[0][:, :0], values[1][:0], values[2][:0], positions(lengths))
    assert none.shape == (sum(lengths), 0)


def test_gradcheck() -> None:
    lengths = [3, 1, 5]
    x, weight, bias = (t.double().requires_grad_() for t in inputs(lengths, 2, 3))
    position = positions(lengths)
    for activation in ("silu", None):
        assert torch.autograd.gradcheck(
            lambda *t, a=activation: causal_conv(*t, position, activation=a), (x, weight, bias)
        )


def test_rows_apart_strides_and_an_expanded_gradient() -> None:
    lengths = [4, 9, 2]
    x, weight, bias = inputs(lengths, 10, 4)
    wide = torch.randn(15, 30)
    wide[:, 7:17] = x
    position = strided_like(positions(lengths))
    found = []
    for given in (x, wide[:, 7:17], strided_like(x)):
        tried = given.detach().requires_grad_()
        y = causal_conv(tried, strided_like(weight), strided_like(bias), position)
        assert y.is_contiguous()
        y.sum().backward()
        found.append((y, tried.grad))
    for y, d_x in found:
        assert torch.equal(y, found[0][0]) and torch.equal(d_x, found[0][1])
    check([x, weight, bias], lengths, grad=torch.ones(()).expand(15, 10))
    check([x, weight, bias], lengths, grad=strided_like(torch.randn(15, 10)))


def test_no_gradient_in_none_out_and_two_runs_bit_equal() -> None:
    lengths = [700, 1, 800]
    values = leaves(inputs(lengths, 70, 4))
    grad = torch.randn(1501, 70)
    runs = []
    for _ in range(2):
        y = causal_conv(*values, positions(lengths))
        assert not any(g.any() for g in gradients(y, values, torch.zeros_like(y)))
        runs.append([y, *gradients(causal_conv(*values, positions(lengths)), values, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_nobody_wants_are_not_computed(dtype: torch.dtype) -> None:
    lengths = [4, 9]
    x, weight, bias = (t.to(dtype) for t in inputs(lengths, 5, 4))
    position, grad = positions(lengths), torch.randn(13, 5).to(dtype)
    bwd = torch.ops.dragkit.causal_conv_bwd
    every = bwd(grad, x, weight, bias, position, True, [True] * 3, False)
    for place in range(3):
        mask = [i == place for i in range(3)]
        found = bwd(grad, x, weight, bias, position, True, mask, False)
        assert torch.equal(found[place], every[place])
        assert all(g.numel() == 0 for i, g in enumerate(found) if i != place)


def test_opcheck() -> None:
    lengths = [4, 9]
    position = positions(lengths)
    fwd, bwd = (getattr(torch.ops.dragkit, f"causal_conv_{n}").default for n in ("fwd", "bwd"))
    for bias in (True, False):
        x, weight, b = with_bias(leaves(inputs(lengths, 5, 4, bias=bias)))
        torch.library.opcheck(fwd, (x, weight, b, position, True, False))
        roomy = strided_like(x.detach()).requires_grad_()
        torch.library.opcheck(fwd, (roomy, weight, b, position, False, False))
        plain = [None if t is None else t.detach() for t in (x, weight, b)]
        for mask in ([True, True, bias], [False] * 3, [True, False, False]):
            torch.library.opcheck(bwd, (torch.randn(13, 5), *plain, position, True, mask, False))
    low = [t.detach().bfloat16() for t in (x, weight)]
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(fwd, (*low, None, position, True, False), test_utils=utils)


def test_second_derivatives_are_refused() -> None:
    x, weight, bias = leaves(inputs([4], 5, 4))
    y = causal_conv(x, weight, bias, positions([4]))
    (d_x,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="causal_conv_bwd has no derivative"):
        d_x.sum().backward()


def test_compiled_equals_eager() -> None:
    x, weight, bias = leaves(inputs([4, 9], 5, 4))
    position = positions([4, 9])
    compiled = torch.compile(causal_conv, fullgraph=True, backend="aot_eager")
    results = []
    for function in (causal_conv, compiled):
        y = function(x, weight, bias, position)
        results.append([y, *torch.autograd.grad((y * y).sum(), [x, weight, bias])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3)}, r"causal_conv: x must have shape \[\*, \*\], got \[3\]"),
        ({"weight": torch.zeros(4, 4)}, r"weight must have shape \[5, \*\], got \[4, 4\]"),
        ({"weight": torch.zeros(5, 0)}, r"weight must have a tap, got shape \[5, 0\]"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \[5\], got \[4\]"),
        ({"position": torch.zeros(2).int()}, r"position must have shape \[3\], got \[2\]"),
        ({"position": torch.zeros(3).long()}, "position must be int32, got torch.int64"),
        ({"x": torch.zeros(3, 5).int()}, "x must be floating point"),
        ({"bias": torch.zeros(5).int()}, "bias must be floating point"),
        ({"activation": "relu"}, "activation must be 'silu' or None, got 'relu'"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    arguments = {
        "x": torch.zeros(3, 5),
        "weight": torch.zeros(5, 4),
        "bias": torch.zeros(5),
        "position": torch.zeros(3).int(),
        "activation": None,
    }
    with pytest.raises(ValueError, match=message):
        causal_conv(**{**arguments, **change})


@pytest.mark.parametrize("width", [1, 2, 4, 5])
def test_state_is_what_the_library_keeps(width: int) -> None:
    """The library pads a short sequence on the left and keeps the last columns."""
    lengths = [1, 2, 3, 4, 5, 9]
    x = torch.randn(sum(lengths), 6)
    last = (torch.tensor(lengths).cumsum(0) - 1).int()
    state = causal_conv_state(x, positions(lengths), last, width)
    expected = [F.pad(p.mT, (width, 0))[:, -width:] for p in x.split(lengths)]
    assert torch.equal(state, torch.stack(expected)) and state.is_contiguous()
    spoilt = x.clone()
    spoilt[0] = math.nan  # of another sequence
    assert torch.equal(causal_conv_state(spoilt, positions(lengths), last, width)[1:], state[1:])


def test_state_continues_the_convolution() -> None:
    lengths, conv = [2, 7], nn.Conv1d(6, 6, 4, groups=6)
    x, new = torch.randn(9, 6), torch.randn(2, 6)
    weight = conv.weight.squeeze(1)
    state = causal_conv_state(x, positions(lengths), torch.tensor([1, 8]).int(), 4)
    state = torch.cat([state[..., 1:], new[..., None]], -1)
    step = F.silu((state * weight).sum(-1) + conv.bias)
    longer = torch.cat([x[:2], new[:1], x[2:], new[1:]])
    whole = causal_conv(longer, weight, conv.bias, positions([3, 8]))
    assert_close(whole[[2, 10]], step, tolerance=2e-6)


def test_wrong_arguments_of_the_state_are_named() -> None:
    x, position, last = torch.zeros(3, 5), torch.zeros(3).int(), torch.zeros(1).int()
    with pytest.raises(ValueError, match="causal_conv_state: width must be at least 1, got 0"):
        causal_conv_state(x, position, last, 0)
    with pytest.raises(ValueError, match="last must be int32"):
        causal_conv_state(x, position, last.long(), 4)
    with pytest.raises(ValueError, match=r"position must have shape \[3\], got \[2\]"):
        causal_conv_state(x, position[:2], last, 4)
    assert causal_conv_state(x, position, last[:0], 4).shape == (0, 5, 4)
