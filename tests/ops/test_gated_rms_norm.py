"""The gated RMS norm against loops and the library's own layers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dragkit_kernels import blocks, gated_rms_norm, gated_rms_norm_ref
from dragkit_kernels.testing import assert_close, gradients, leaves, strided_like

FORWARD = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
BOTH = pytest.mark.parametrize("function", [gated_rms_norm, gated_rms_norm_ref])
GATED = pytest.mark.parametrize("gated", [True, False], ids=["gate", "none"])
EPS = 1e-5


def inputs(rows: int, columns: int, *, gated: bool = True) -> list[Tensor]:
    """y, weight and perhaps a gate."""
    values = [torch.randn(rows, columns), 1 + 0.3 * torch.randn(columns)]
    return [*values, torch.randn(rows, columns)] if gated else values


def in_order(values: list[Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
    y, weight, *gate = values
    return y, gate[0] if gate else None, weight


def loop_norm(values: list[Tensor], groups: int) -> Tensor:
    """Group by group, in float64."""
    y, gate, weight = in_order(values)
    size = y.shape[1] // groups
    rows = []
    for row in range(y.shape[0]):
        z = y[row] if gate is None else y[row] * gate[row] / (1 + torch.exp(-gate[row]))
        pieces = [piece / torch.sqrt((piece * piece).sum() / size + EPS) for piece in z.split(size)]
        rows.append(torch.cat(pieces) * weight)
    return torch.stack(rows)


def check(
    values: list[Tensor],
    groups: int = 1,
    function: Callable = gated_rms_norm,
    grad: Tensor | None = None,
) -> None:
    tried, exact = leaves(values), leaves([x.double() for x in values])
    actual = function(*in_order(tried), groups=groups, eps=EPS)
    expected = loop_norm(exact, groups)
    assert actual.dtype == values[0].dtype
    assert_close(actual, expected, tolerance=FORWARD[actual.dtype])
    if grad is None:
        grad = torch.randn(actual.shape).to(actual.dtype)
    found = gradients(actual, tried, grad)
    for got, want, given in zip(found, gradients(expected, exact, grad), values, strict=True):
        assert got.dtype == given.dtype
        assert_close(got, want)


@BOTH
@GATED
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("dtype", list(FORWARD), ids=str)
def test_matches_the_loop(dtype: torch.dtype, groups: int, gated: bool, function: Callable) -> None:
    check([x.to(dtype) for x in inputs(9, 24, gated=gated)], groups, function)


@GATED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("columns", "groups"), [(2, 1), (7, 1), (7, 7), (64, 1), (64, 8), (96, 2), (257, 1)], ids=str
)
def test_widths(columns: int, groups: int, dtype: torch.dtype, gated: bool) -> None:
    if columns == groups:  # a group of one is its sign: no gradient but eps's
        y = torch.tensor([[3.0, -2.0, 0.0, 5.0, -7.0, 1.0, -1.0]]).to(dtype)
        signs = gated_rms_norm(y, None, torch.ones(7).to(dtype), groups=7)
        assert_close(signs, y.sign(), tolerance=8e-3)
        return
    check([x.to(dtype) for x in inputs(5, columns, gated=gated)], groups)


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_blocks_of_any_size(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK", 1)
    monkeypatch.setattr(blocks, "_ROWS", rows)
    for gated in (True, False):
        values = inputs(11, 12, gated=gated)
        check([x.double() for x in values], 3)
        check([x.bfloat16() for x in values], 3)


@GATED
def test_rows_do_not_see_one_another(gated: bool) -> None:
    y, gate, weight = in_order(inputs(6, 12, gated=gated))
    packed = gated_rms_norm(y, gate, weight, groups=3)
    for row in range(6):
        one = slice(row, row + 1)
        alone = gated_rms_norm(y[one], None if gate is None else gate[one], weight, groups=3)
        assert_close(packed[one], alone, tolerance=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_the_layers_of_the_library(dtype: torch.dtype) -> None:
    library = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    y, gate, weight = (x.to(dtype) for x in in_order(inputs(13, 48)))
    layer = library.NemotronHRMSNormGated(48, group_size=12, eps=EPS).to(dtype)
    plain = library.NemotronHRMSNorm(48, eps=EPS).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        plain.weight.copy_(weight)
        # The layer with a gate rounds before the weight as well.
        limit = 2e-6 if dtype == torch.float32 else 8e-3
        assert_close(
            gated_rms_norm(y, gate, weight, groups=4, eps=EPS),
            layer(y, gate).double(),
            tolerance=limit,
        )
        assert_close(gated_rms_norm(y, None, weight, eps=EPS), plain(y).double(), tolerance=limit)


@BOTH
@GATED
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_number_stays_in_its_group(bad: float, gated: bool, function: Callable) -> None:
    values = inputs(4, 12, gated=gated)
    clean = function(*in_order(values), groups=3)
    for place in range(len(values) - 1):
        tried = [x.clone() for x in values]
        tried[2 * place][1, 5] = bad
        tried = leaves(tried)
        out = function(*in_order(tried), groups=3)
        spoilt = torch.zeros(4, 12, dtype=torch.bool)
        spoilt[1, 4:8] = True
        assert torch.equal(out[~spoilt], clean[~spoilt])
        assert out[1, 5].isnan()
        for got in gradients(out, tried[:1] + tried[2:], torch.randn(4, 12)):
            assert got[~spoilt].isfinite().all()
    tried, grad = leaves(values), torch.randn(4, 12)
    grad[1, 5] = bad
    for got in gradients(function(*in_order(tried), groups=3), tried[:1] + tried[2:], grad):
        assert got[~spoilt].isfinite().all() and not got[1, 5].isfinite()


def test_zeros_and_large_numbers() -> None:
    y = torch.zeros(3, 8)
    y[1] = 1e15
    y[2] = 1e-25
    y.requires_grad_()
    out = gated_rms_norm(y, None, torch.ones(8), eps=EPS)
    assert not out[0].any() and torch.allclose(out[1], torch.ones(8))
    (d_y,) = torch.autograd.grad(out.sum(), y)
    assert d_y.isfinite().all()


@GATED
def test_no_rows_and_no_columns(gated: bool) -> None:
    for rows, columns in ((0, 6), (4, 0), (0, 0)):
        values = leaves(inputs(rows, columns, gated=gated))
        out = gated_rms_norm(*in_order(values), groups=2)
        assert out.shape == (rows, columns)
        for got, given in zip(torch.autograd.grad(out.sum(), values), values, strict=True):
            assert got.shape == given.shape and not got.any()


def test_gradcheck() -> None:
    for gated in (True, False):
        values = [x.double().requires_grad_() for x in inputs(3, 6, gated=gated)]
        assert torch.autograd.gradcheck(
            lambda *t: gated_rms_norm(*in_order(list(t)), groups=2), tuple(values)
        )


def test_rows_apart_strides_and_an_expanded_gradient() -> None:
    y, gate, weight = in_order(inputs(7, 10))
    wide = torch.cat([torch.randn(7, 3), y, gate, torch.randn(7, 5)], 1)
    found = []
    for given in (
        (y, gate),
        (wide[:, 3:13], wide[:, 13:23]),
        (strided_like(y), strided_like(gate)),
    ):
        tried = leaves(list(given))
        out = gated_rms_norm(*tried, strided_like(weight), groups=5)
        assert out.is_contiguous()
        found.append([out, *torch.autograd.grad(out.sum(), tried)])
    for run in found[1:]:
        for got, want in zip(run, found[0], strict=True):
            assert_close(got, want, tolerance=2e-6)
    check([y, weight, gate], 5, grad=torch.ones(()).expand(7, 10))
    check([y, weight, gate], 5, grad=strided_like(torch.randn(7, 10)))


def test_no_gradient_in_none_out_and_two_runs_bit_equal() -> None:
    values = leaves(inputs(1500, 70))
    grad = torch.randn(1500, 70)
    runs = []
    for _ in range(2):
        out = gated_rms_norm(*in_order(values), groups=7)
        assert not any(g.any() for g in gradients(out, values, torch.zeros_like(out)))
        out = gated_rms_norm(*in_order(values), groups=7)
        runs.append([out, *gradients(out, values, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_nobody_wants_are_not_computed(dtype: torch.dtype) -> None:
    y, gate, weight = (x.to(dtype) for x in in_order(inputs(7, 10)))
    grad = torch.randn(7, 10).to(dtype)
    bwd = torch.ops.dragkit.gated_rms_norm_bwd
    every = bwd(grad, y, gate, weight, 2, EPS, [True] * 3, False)
    for place in range(3):
        mask = [i == place for i in range(3)]
        found = bwd(grad, y, gate, weight, 2, EPS, mask, False)
        assert torch.equal(found[place], every[place])
        assert all(g.numel() == 0 for i, g in enumerate(found) if i != place)


def test_opcheck() -> None:
    fwd, bwd = (getattr(torch.ops.dragkit, f"gated_rms_norm_{n}").default for n in ("fwd", "bwd"))
    for gated in (True, False):
        values = in_order(leaves(inputs(5, 6, gated=gated)))
        torch.library.opcheck(fwd, (*values, 2, EPS, False))
        roomy = strided_like(values[0].detach()).requires_grad_()
        torch.library.opcheck(fwd, (roomy, *values[1:], 3, EPS, False))
        plain = [None if t is None else t.detach() for t in values]
        for mask in ([True, gated, True], [False] * 3, [True, False, False]):
            torch.library.opcheck(bwd, (torch.randn(5, 6), *plain, 2, EPS, mask, False))
    low = [t.detach().bfloat16() for t in (values[0], values[2])]
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(fwd, (low[0], low[0], low[1], 2, EPS, False), test_utils=utils)


def test_second_derivatives_are_refused() -> None:
    y, gate, weight = in_order(leaves(inputs(4, 6)))
    out = gated_rms_norm(y, gate, weight)
    (d_y,) = torch.autograd.grad((out**2).sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="gated_rms_norm_bwd has no derivative"):
        d_y.sum().backward()


def test_compiled_equals_eager() -> None:
    def norm(*values: Tensor) -> Tensor:
        return gated_rms_norm(*values, groups=2, eps=EPS)

    values = leaves(list(in_order(inputs(5, 6))))
    results = []
    for function in (norm, torch.compile(norm, fullgraph=True, backend="aot_eager")):
        out = function(*values)
        results.append([out, *torch.autograd.grad((out * out).sum(), values)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_formula() -> None:
    """Written out for two columns."""
    y, gate = torch.tensor([[3.0, 4.0]]), torch.tensor([[20.0, 20.0]])
    expected = torch.tensor([[3.0, 8.0]]) / math.sqrt(12.5)
    out = gated_rms_norm(y, None, torch.tensor([1.0, 2.0]), eps=0.0)
    assert_close(out, expected, tolerance=1e-6)
    out = gated_rms_norm(y, gate, torch.tensor([1.0, 2.0]), eps=0.0)
    assert_close(out, expected, tolerance=1e-6)
    gate = torch.tensor([[1.0, -1.0]])
    out = gated_rms_norm(y, gate, torch.ones(2), eps=1.0)
    z = y * F.silu(gate)
    assert_close(out, z / math.sqrt(float(z.square().mean()) + 1), tolerance=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(3)}, r"gated_rms_norm: y must have shape \[\*, \*\], got \[3\]"),
        ({"weight": torch.zeros(4)}, r"weight must have shape \[6\], got \[4\]"),
        ({"gate": torch.zeros(3, 5)}, r"gate must have shape \[3, 6\], got \[3, 5\]"),
        ({"gate": torch.zeros(3, 6).int()}, "gate must be floating point"),
        ({"groups": 4}, r"groups must divide the columns of y, got 4 for shape \[3, 6\]"),
        ({"groups": 0}, "groups must divide the columns of y, got 0"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"y": torch.zeros(3, 6), "gate": None, "weight": torch.zeros(6), "groups": 2}
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(**{**arguments, **change})
