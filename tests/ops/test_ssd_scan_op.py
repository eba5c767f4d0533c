"""The packed scan as an operator: strides, numbers that are not finite, compilers, bad calls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dragkit_kernels import ssd_scan, ssd_state
from dragkit_kernels.testing import assert_close, gradients, leaves, strided_like
from tests.ops.ssd_scan_cases import NAMES, SHAPES, check, make_inputs, positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(dtype: torch.dtype) -> None:
    values, position = make_inputs(75, SHAPES[0], dtype), positions((40, 35))
    one = torch.ones((), dtype=dtype).expand(values[0].shape)
    check([strided_like(t) for t in values], strided_like(position), one)
    # Parts of one row, as a convolution leaves them.
    mixed = torch.randn(75, 12 + 10 + 10).to(dtype)
    x, into, out_of = mixed.split([12, 10, 10], 1)
    parts = x.unflatten(1, (4, 3)), into.unflatten(1, (2, 5)), out_of.unflatten(1, (2, 5))
    check([parts[0], values[1], values[2], *parts[1:], values[5]], position)


def test_two_runs_are_bit_equal() -> None:
    values, position = make_inputs(300, (6, 32, 2, 16), torch.float32), positions((170, 130))
    runs = []
    for _ in range(2):
        tried = leaves(values)
        y = ssd_scan(*tried, position)
        runs.append((y, *gradients(y, tried, torch.ones_like(y))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1, 3, 4], ids=["x", "dt", "into", "out_of"])
def test_what_is_not_finite_stays_in_its_sequence(place: int, value: float) -> None:
    """Both neighbours lie in the same chunk, and the last sequence goes on in the next."""
    lengths = (10, 12, 30)
    values, position = make_inputs(52, SHAPES[0], torch.float32), positions(lengths)
    wanted = ssd_scan(*values, position)
    last = torch.tensor([9, 21, 51])
    states = ssd_state(*values[:4], position, last)
    grad = torch.randn_like(values[0])
    clean = leaves(values)
    want = gradients(ssd_scan(*clean, position), clean, grad)
    values[place][14] = abs(value) if place == 1 else value
    tried = leaves(values)
    y = ssd_scan(*tried, position)
    spoiled = torch.zeros(52, dtype=torch.bool)
    spoiled[14 : 15 if place == 4 else 22] = True
    assert torch.equal(y.isfinite().flatten(1).all(1), ~spoiled)
    assert_close(y[~spoiled], wanted[~spoiled].double(), tolerance=1e-6)
    if place != 4:
        got = ssd_state(*values[:4], position, last)
        assert not got[1].isfinite().any()
        assert_close(got[[0, 2]], states[[0, 2]].double(), tolerance=1e-6)
    others = torch.cat([torch.arange(10), torch.arange(22, 52)])
    for name, g, w in zip(NAMES, gradients(y, tried, grad), want, strict=True):
        if name not in ("rate", "skip"):
            assert_close(g[others], w[others].double(), name=name, tolerance=1e-6)
            assert not g[14].isfinite().all()


def test_a_gradient_that_is_not_finite_stays_in_its_sequence() -> None:
    values, position = make_inputs(52, SHAPES[0], torch.float32), positions((10, 12, 30))
    grad = torch.randn_like(values[0])
    grad[14, 1, 1] = float("nan")
    tried = leaves(values)
    for name, g in zip(NAMES, gradients(ssd_scan(*tried, position), tried, grad), strict=True):
        if name not in ("rate", "skip"):
            assert g[:10].isfinite().all() and g[22:].isfinite().all(), name
            assert not g[10:22].isfinite().all(), name


def test_states_have_no_gradient() -> None:
    values = leaves(make_inputs(9, SHAPES[0]))
    arguments = (*values[:4], torch.arange(9).int(), torch.tensor([8]))
    with pytest.raises(ValueError, match="ssd_state: has no gradient"):
        ssd_state(*arguments)
    with torch.no_grad():
        assert not ssd_state(*arguments).requires_grad


def test_opcheck() -> None:
    values, position = make_inputs(40, (4, 2, 2, 3), torch.float32), positions((5, 33, 2))
    ops = torch.ops.dragkit
    torch.library.opcheck(ops.ssd_scan_fwd.default, (*leaves(values), position, False))
    grad = torch.randn_like(values[0])
    for mask in ([True] * 6, [True, False, False, True, False, False]):
        torch.library.opcheck(ops.ssd_scan_bwd.default, (grad, *values, position, mask, False))
    last = torch.tensor([4, 37])
    torch.library.opcheck(ops.ssd_state_fwd.default, (*values[:4], position, last, False))
    low = make_inputs(40, (4, 2, 2, 3), torch.bfloat16)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.ssd_scan_fwd.default, (*low, position, False), test_utils=tests)


def test_compiled_equals_eager_for_any_size() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ssd_scan, fullgraph=True, backend=counter, dynamic=True)
    for lengths in ((33, 7), (5, 40, 31)):
        values, position = make_inputs(sum(lengths), SHAPES[0]), positions(lengths)
        grad = torch.randn_like(values[0])
        results = []
        for function in (ssd_scan, compiled):
            tried = leaves(values)
            y = function(*tried, position)
            results.append((y, *gradients(y, tried, grad)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counter.frame_count == 1


def test_second_derivatives_are_refused() -> None:
    tried = leaves(make_inputs(9, SHAPES[0]))
    y = ssd_scan(*tried, torch.arange(9).int())
    (grad,) = torch.autograd.grad((y**2).sum(), tried[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="ssd_scan_bwd has no derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(9, 4)}, r"x must have shape \[\*, \*, \*\], got \[9, 4\]"),
        ({"dt": torch.zeros(9, 3)}, r"dt must have shape \[9, 4\], got \[9, 3\]"),
        ({"dt": torch.zeros(9, 4).bfloat16()}, "dt must be float32 or float64"),
        ({"rate": torch.zeros(3)}, r"rate must have shape \[4\], got \[3\]"),
        ({"into": torch.zeros(8, 2, 5)}, r"into must have shape \[9, \*, \*\]"),
        ({"into": torch.zeros(9, 3, 5)}, r"multiple of groups, got x \(9, 4, 3\) and into \(9, 3"),
        ({"out_of": torch.zeros(9, 2, 4)}, r"out_of must have shape \[9, 2, 5\]"),
        ({"skip": torch.zeros(4, 1)}, r"skip must have shape \[4\]"),
        ({"x": torch.zeros(9, 4, 3).long()}, "x must be floating point"),
        ({"position": torch.zeros(9)}, "position must be int32"),
        ({"position": torch.zeros(8).int()}, r"position must have shape \[9\], got \[8\]"),
    ],
)
def test_wrong_arguments(change: dict[str, Tensor], message: str) -> None:
    values = dict(zip(NAMES, make_inputs(9, SHAPES[0], torch.float32), strict=True))
    with pytest.raises(ValueError, match=f"ssd_scan: .*{message}"):
        ssd_scan(**{**values, "position": torch.arange(9).int(), **change})


def test_wrong_ends() -> None:
    values, position = make_inputs(9, SHAPES[0]), torch.arange(9).int()
    with pytest.raises(ValueError, match="last must be int64"):
        ssd_state(*values[:4], position, torch.tensor([8]).int())
    with pytest.raises(ValueError, match="last must have shape"):
        ssd_state(*values[:4], position, torch.tensor([[8]]))
