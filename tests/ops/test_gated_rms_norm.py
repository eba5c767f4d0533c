"""The gated RMS norm: the reference against a loop, both backends against the reference."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dragkit_kernels import blocks, gated_rms_norm, gated_rms_norm_ref
from dragkit_kernels.testing import (
    assert_close,
    fenced_allocations,
    gradients,
    leaves,
    random,
    strided_like,
)
from tests.ops.cases import DTYPES, FORWARD, GRADIENT, kernels

# The interpreter also computes masked elements, which overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
GATED = pytest.mark.parametrize("gated", [True, False], ids=["gate", "none"])
EPS = 1e-5


def inputs(
    rows: int, columns: int, device: torch.device | str = "cpu", *, gated: bool = True
) -> list[Tensor]:
    """[y, weight], and the gate if asked for."""
    values = [random(rows, columns), 1 + 0.3 * random(columns, seed=1)]
    values += [random(rows, columns, seed=2)] if gated else []
    return [x.to(device) for x in values]


def as_arguments(values: list[Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
    """(y, gate, weight) in the order of the op."""
    y, weight, *gate = values
    return y, gate[0] if gate else None, weight


def check(
    values: list[Tensor],
    groups: int,
    backend: str,
    grad: Tensor | None = None,
    *,
    eps: float = EPS,
) -> None:
    """Compares output and gradients with float64, for a trained and for a frozen weight."""
    exact_args = leaves([x.double() for x in values])
    expected = gated_rms_norm_ref(*as_arguments(exact_args), groups=groups, eps=eps)
    if grad is None:
        grad = random(*expected.shape, seed=9).to(values[0])
    wanted = gradients(expected, exact_args, grad)
    for learned in (True, False):
        args = leaves(values)
        args[1].requires_grad_(learned)
        with fenced_allocations():
            actual = gated_rms_norm(*as_arguments(args), groups=groups, eps=eps, backend=backend)
            grads = iter(gradients(actual, [x for x in args if x.requires_grad], grad))
        assert actual.dtype == values[0].dtype and actual.is_contiguous()
        assert_close(actual, expected, tolerance=FORWARD.get(actual.dtype, 1e-12))
        for name, leaf, want in zip(("y", "weight", "gate"), args, wanted, strict=False):
            if leaf.requires_grad:
                got = next(grads)
                assert got.dtype == leaf.dtype
                assert_close(got, want, tolerance=GRADIENT.get(got.dtype), name=name)


def test_the_reference_is_the_formula() -> None:
    """Compares with a loop over groups, and with numbers by hand for two columns."""
    for groups in (1, 2, 6):
        y, gate, weight = as_arguments([x.double() for x in inputs(9, 24)])
        z = y * gate / (1 + torch.exp(-gate))
        parts = [p / torch.sqrt((p * p).sum(1, keepdim=True) * groups / 24 + EPS)
                 for p in z.split(24 // groups, dim=1)]  # fmt: skip
        out = gated_rms_norm_ref(y, gate, weight, groups=groups, eps=EPS)
        assert_close(out, torch.cat(parts, 1) * weight, tolerance=1e-12)
    y, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0])
    expected = torch.tensor([[3.0, 8.0]]) / math.sqrt(12.5)
    for gate in (None, torch.tensor([[20.0, 20.0]])):
        assert_close(gated_rms_norm_ref(y, gate, weight, eps=0.0), expected, tolerance=1e-6)
    gate = torch.tensor([[1.0, -1.0]])
    z = y * F.silu(gate)
    expected = z / math.sqrt(float(z.square().mean()) + 1)
    out = gated_rms_norm_ref(y, gate, torch.ones(2), eps=1.0)
    assert_close(out, expected, tolerance=1e-6)


@GATED
@DTYPES
@pytest.mark.parametrize(
    ("columns", "groups"),
    [(2, 1), (7, 1), (64, 4), (96, 2), (128, 1), (129, 1), (257, 1), (1024, 2), (2688, 1)],
    ids=str,
)
def test_dtypes_and_widths(
    backend: str, device: torch.device, columns: int, groups: int, dtype: torch.dtype, gated: bool
) -> None:
    check([x.to(dtype) for x in inputs(5, columns, device, gated=gated)], groups, backend)


def test_a_group_of_one_column_is_its_sign(backend: str, device: torch.device) -> None:
    y = torch.tensor([[3.0, -2.0, 0.0, 5.0]], device=device)
    signs = gated_rms_norm(y, None, torch.ones_like(y[0]), groups=4, backend=backend)
    assert_close(signs, y.sign(), tolerance=1e-5)
    y = random(3, 1).to(device)
    signs = gated_rms_norm(y, None, torch.ones_like(y[0]), backend=backend)
    assert_close(signs, y.sign(), tolerance=1e-3)


@GATED
@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_blocks_of_any_size(rows: int, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK", 1)
    monkeypatch.setattr(blocks, "_ROWS", rows)
    for dtype in (torch.float64, torch.bfloat16):
        check([x.to(dtype) for x in inputs(11, 12, gated=gated)], 3, "torch")


@pytest.mark.triton
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 32, 33, 70])
def test_program_boundaries(
    device: torch.device, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program takes tiles of 8 rows: 4 tiles, or a third of all rows when it sums."""
    monkeypatch.setattr(kernels("gated_rms_norm.backward"), "MAX_SUM_PROGRAMS", 3)
    check(inputs(rows, 6, device), 2, "triton")


@pytest.mark.triton
@pytest.mark.parametrize("rows", [8, 9, 17])
def test_program_boundaries_of_wide_groups(
    device: torch.device, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels("gated_rms_norm.backward"), "MAX_SUM_PROGRAMS", 2)
    check(inputs(rows, 260, device), 1, "triton")
    check(inputs(rows // 2, 600, device), 1, "triton")


@GATED
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_stay_in_their_group(
    backend: str, device: torch.device, value: float, gated: bool
) -> None:
    for index in range(0, 3 if gated else 1, 2):
        values = inputs(9, 12, device, gated=gated)
        values[index][1, 5] = value
        check(values, 3, backend)
    grad = random(9, 12, seed=9).to(device)
    grad[8, 4] = value
    values = leaves(inputs(9, 12, device, gated=gated))
    out = gated_rms_norm(*as_arguments(values), groups=3, backend=backend)
    inside = torch.zeros(9, 12, dtype=torch.bool, device=device)
    inside[8, 4:8] = True
    d_y, d_weight, *d_gate = gradients(out, values, grad)
    for got in (d_y, *d_gate):
        assert got[~inside].isfinite().all() and not got[inside].isfinite().any()
    assert (~d_weight.isfinite()).nonzero().flatten().tolist() == [4]


def test_eps_of_zero(backend: str, device: torch.device) -> None:
    """Masked rows have an infinite scale when eps is 0."""
    check(inputs(9, 10, device), 2, backend, eps=0.0)


def test_zeros_and_large_numbers(backend: str, device: torch.device) -> None:
    y = torch.zeros(3, 8, device=device)
    y[1], y[2] = 1e15, 1e-25
    y.requires_grad_()
    out = gated_rms_norm(y, None, torch.ones_like(y[0]), eps=EPS, backend=backend)
    assert not out[0].any() and torch.allclose(out[1], torch.ones_like(out[1]))
    (d_y,) = torch.autograd.grad(out.sum(), y)
    assert d_y.isfinite().all()


def test_row_strides_and_expanded_gradients(backend: str, device: torch.device) -> None:
    y, weight, gate = inputs(7, 10, device)
    wide = torch.cat([random(7, 3).to(device), y, gate], 1)
    for grad in (
        torch.ones((), device=device).expand(7, 10),
        random(7, 1).to(device).expand(7, 10),
        strided_like(random(7, 10).to(device)),
        random(7, 20).to(device)[:, 3:13],
    ):
        check([wide[:, 3:13], weight, wide[:, 13:]], 5, backend, grad)
    check([strided_like(y), strided_like(weight), strided_like(gate)], 5, backend)
    check([y[:1].expand(7, 10), weight, gate], 5, backend)


@pytest.mark.triton
def test_slices_are_not_copied(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = kernels("gated_rms_norm.forward")
    wide, weight = random(5, 20).to(device), random(6).to(device)
    given = wide[:, 2:8], wide[:, 9:15]
    passed = []
    plain = forward.row_strided
    monkeypatch.setattr(forward, "row_strided", lambda t: passed.append(plain(t)) or passed[-1])
    gated_rms_norm(*given, weight, backend="triton")
    assert [t.data_ptr() for t in passed] == [t.data_ptr() for t in given]


@GATED
@pytest.mark.parametrize("shape", [(0, 6), (4, 0), (0, 0)])
def test_empty_inputs(
    backend: str, device: torch.device, shape: tuple[int, int], gated: bool
) -> None:
    values = leaves(inputs(*shape, device, gated=gated))
    with fenced_allocations():
        out = gated_rms_norm(*as_arguments(values), groups=2, backend=backend)
        grads = torch.autograd.grad(out.sum(), values)
    assert out.shape == shape
    for got, given in zip(grads, values, strict=True):
        assert got.shape == given.shape and not got.any()


@pytest.mark.triton
def test_a_group_beyond_the_largest_tile_raises(device: torch.device) -> None:
    y = torch.ones(1, 4097, device=device)
    with pytest.raises(ValueError, match="groups of up to 4096 columns, got 4097. Use backend"):
        gated_rms_norm(y, None, y[0], backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_the_layers_of_transformers(dtype: torch.dtype) -> None:
    modeling = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    y, gate, weight = (x.to(dtype) for x in as_arguments(inputs(13, 48)))
    layer = modeling.NemotronHRMSNormGated(48, group_size=12, eps=EPS).to(dtype)
    plain = modeling.NemotronHRMSNorm(48, eps=EPS).to(dtype)
    # The gated layer of transformers also rounds before it applies the weight.
    limit = 2e-6 if dtype == torch.float32 else 8e-3
    with torch.no_grad():
        layer.weight.copy_(weight)
        plain.weight.copy_(weight)
        out = gated_rms_norm(y, gate, weight, groups=4, eps=EPS)
        assert_close(out, layer(y, gate).double(), tolerance=limit)
        out = gated_rms_norm(y, None, weight, eps=EPS)
        assert_close(out, plain(y).double(), tolerance=limit)


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
def test_wrong_arguments_raise(change: dict, message: str) -> None:
    arguments = {"y": torch.zeros(3, 6), "gate": None, "weight": torch.zeros(6), "groups": 2}
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(**{**arguments, **change})
