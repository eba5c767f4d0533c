"""The packed Mamba-2 scan: both backends against the float64 recurrence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dragkit_kernels import scan_chunk, ssd_scan, ssd_scan_ref, ssd_state, ssd_state_ref
from dragkit_kernels.ssd_scan import slabs, torch_impl
from dragkit_kernels.testing import (
    assert_close,
    fenced_allocations,
    gradients,
    leaves,
    positions,
    random,
    strided_like,
)
from tests.ops.cases import DTYPES, FORWARD, GRADIENT

# The interpreter also computes masked elements, which overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NAMES = ("x", "dt", "A", "B", "C", "D")
# Lengths around chunks of 32 and 64 rows, in several orders.
LENGTHS = (1, 33, 2, 28, 65, 4)
ORDERS = ((1, 2, 31, 32, 33, 101), (101, 33, 32, 31, 2, 1), (1, 1, 1, 101, 2, 2, 33))
# (heads, head width, groups, states).
SHAPES = ((4, 3, 2, 5), (3, 7, 3, 1), (6, 1, 1, 64), (1, 5, 1, 3))
SMALL = (1, 3, 1, 5)


def make_inputs(
    rows: int,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """x, dt, A, B, C, D. dt, A and D are at least float32."""
    heads, width, groups, states = shape
    draw = torch.Generator().manual_seed(rows + width)
    maps = (rows, groups, states)
    sizes = ((rows, heads, width), (rows, heads), (heads,), maps, maps, (heads,))
    values = [torch.randn(s, generator=draw, dtype=torch.float64) for s in sizes]
    values[1] = F.softplus(values[1] - 2)
    values[2] = -3 * torch.rand(heads, generator=draw, dtype=torch.float64) - 0.02
    values[3:5] = (t / max(states, 1) ** 0.5 for t in values[3:5])
    full = torch.promote_types(dtype, torch.float32)
    dtypes = (dtype, full, full, dtype, dtype, full)
    return [t.to(device, value_dtype) for t, value_dtype in zip(values, dtypes, strict=True)]


def random_grad(values: list[Tensor]) -> Tensor:
    return random(*values[0].shape, seed=1).to(values[0])


def check(
    values: list[Tensor],
    seq_pos: Tensor,
    backend: str,
    grad: Tensor | None = None,
    *,
    tolerance: float | None = None,
) -> None:
    """Compares output, gradients and final states, with poisoned allocations."""
    exact_args, args = leaves([t.double() for t in values]), leaves(values)
    expected = ssd_scan_ref(*exact_args, seq_pos)
    grad = random_grad(values) if grad is None else grad
    ends = (seq_pos == 0).nonzero().flatten()[1:] - 1
    last = torch.cat([ends, ends.new_tensor([len(seq_pos) - 1])]).flip(0)
    with fenced_allocations():
        actual = ssd_scan(*args, seq_pos, backend=backend)
        grads = gradients(actual, args, grad)
        state = ssd_state(*values[:4], seq_pos, last, backend=backend)
    dtype = values[0].dtype
    limit = tolerance or FORWARD.get(dtype, 1e-12)
    assert actual.dtype == dtype
    assert_close(actual, expected, name="y", tolerance=limit)
    assert state.dtype == torch.promote_types(dtype, torch.float32)
    want = ssd_state_ref(*(t.double() for t in values[:4]), seq_pos, last)
    assert_close(state, want, name="state", tolerance=limit)
    limit = tolerance or GRADIENT.get(dtype, 1e-10)
    wanted = gradients(expected, exact_args, grad.double())
    for name, t, g, want in zip(NAMES, values, grads, wanted, strict=True):
        assert g.dtype == t.dtype, name
        if name == "A":
            # dA sums over all rows and may cancel, so its error is relative to its terms.
            scale = (wanted[1] * exact_args[1]).abs().sum(0)
            assert ((g - want).abs() <= limit * scale + 1e-9).all(), (g, want, scale)
        else:
            assert_close(g, want, name=f"d{name}", tolerance=limit)


def test_the_reference_is_the_recurrence() -> None:
    """Three rows computed by hand, and a NaN that stays in its sequence."""
    x, dt, A = torch.tensor([2.0, 3.0, 5.0]), torch.tensor([1.0, 0.5, 2.0]), torch.tensor([-1.0])
    B, C, D = torch.tensor([1.0, -1.0, 0.5]), torch.tensor([3.0, 2.0, 4.0]), torch.tensor([0.25])
    values = [x.view(3, 1, 1), dt.view(3, 1), A, B.view(3, 1, 1), C.view(3, 1, 1), D]
    decay = float(torch.tensor(-0.5).exp())
    states = torch.tensor([2.0, 2.0 * decay - 1.5, 5.0])
    y = ssd_scan_ref(*values, positions((2, 1)))
    assert_close(y.flatten(), states * C + 0.25 * x, tolerance=1e-6)
    found = ssd_state_ref(*values[:4], positions((2, 1)), torch.tensor([2, 1]))
    assert_close(found.flatten(), states[[2, 1]], tolerance=1e-6)
    values[0][1] = torch.nan
    args = leaves(values)
    y = ssd_scan_ref(*args, positions((2, 1)))
    assert y.flatten().isfinite().tolist() == [True, False, True]
    (d_x,) = torch.autograd.grad(y.sum(), args[0])
    assert d_x[2].isfinite().all()


@DTYPES
def test_every_gradient(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    check(make_inputs(133, (2, 7, 1, 5), dtype, device), positions(LENGTHS, device), backend)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lengths", ORDERS, ids=str)
def test_orders_of_sequences(lengths: tuple[int, ...], shape: tuple[int, ...]) -> None:
    check(make_inputs(sum(lengths), shape), positions(lengths), "torch")


def test_one_sequence_of_many_chunks(backend: str, device: torch.device) -> None:
    for dtype in (torch.float32, torch.float16):
        check(make_inputs(133, SMALL, dtype, device), positions((133,), device), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (1, 64, 1, 96), (1, 96, 1, 64), (1, 7, 1, 257), (2, 5, 2, 4), (4, 5, 2, 4)],
    ids=str,
)
def test_widths_and_groups(
    backend: str, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    check(make_inputs(40, shape, dtype, device), positions((35, 5), device), backend)


@pytest.mark.parametrize("slab_bytes", [1, 200_000])
@pytest.mark.parametrize("lengths", [ORDERS[0], (230,)], ids=str)
def test_many_slabs(
    slab_bytes: int, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slabs, "SLAB_BYTES", slab_bytes)
    values, seq_pos = make_inputs(sum(lengths), SHAPES[0]), positions(lengths)
    assert len(list(slabs.ScanSizes.infer(values[0], values[3]).slab_ranges())) > 1
    check(values, seq_pos, "torch")
    every = torch.arange(sum(lengths))
    state = ssd_state(*values[:4], seq_pos, every, backend="torch")
    assert_close(state, ssd_state_ref(*values[:4], seq_pos, every))


@pytest.mark.parametrize("chunk", [1, 2, 8, 64, 128])
def test_the_chunk_changes_no_result(chunk: int) -> None:
    values, seq_pos = make_inputs(sum(ORDERS[2]), SHAPES[0]), positions(ORDERS[2])
    args = leaves(values)
    y = ssd_scan_ref(*args, seq_pos)
    assert_close(torch_impl.scan_forward(*values, seq_pos, chunk=chunk), y)
    grad = random_grad(values)
    grads = torch_impl.scan_backward(grad, *values, seq_pos, [True] * 6, chunk=chunk)
    for name, g, want in zip(NAMES, grads, gradients(y, args, grad), strict=True):
        assert_close(g, want, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strides(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    values, seq_pos = make_inputs(45, (2, 3, 2, 5), dtype, device), positions((40, 5), device)
    one = torch.ones((), dtype=dtype, device=device).expand(values[0].shape)
    check([strided_like(t) for t in values], strided_like(seq_pos), backend, one)
    # x, B and C as column slices of one matrix, as the mixer passes them.
    mixed = torch.randn(45, 6 + 10 + 10).to(device, dtype)
    x, B, C = mixed.split([6, 10, 10], 1)
    parts = x.unflatten(1, (2, 3)), B.unflatten(1, (2, 5)), C.unflatten(1, (2, 5))
    grad = torch.randn(45, 30).to(device, dtype)[:, 5:11].unflatten(1, (2, 3))
    check([parts[0], values[1], values[2], *parts[1:], values[5]], seq_pos, backend, grad)


@pytest.mark.parametrize("indices", [(0,), (3, 4), (2, 5)], ids=str)
def test_mixed_precision(backend: str, device: torch.device, indices: tuple[int, ...]) -> None:
    """Products of mixed dtypes run in float32. Only float16 results are rounded."""
    values = make_inputs(40, (1, 5, 1, 4), torch.float32, device)
    for index in indices:
        values[index] = values[index].half()
    check(values, positions((40,), device), backend, tolerance=2e-3)


def test_rows_of_padding_change_nothing(backend: str, device: torch.device) -> None:
    """Each padding row is a sequence of one row."""
    values = make_inputs(70, SMALL, torch.float32, device)
    seq_pos = positions((20, 1, 45, *([1] * 4)), device)
    grad = random_grad(values)
    grad[66:] = 0
    check(values, seq_pos, backend, grad)
    results = []
    for with_nan in (False, True):
        if with_nan:
            for t in (values[0], values[3], values[4]):
                t[66:] = torch.nan
        args = leaves(values)
        y = ssd_scan(*args, seq_pos, backend=backend)
        results.append((y, *(g for g in gradients(y, args, grad) if len(g) == 70)))
    assert all(torch.equal(a[:66], b[:66]) for a, b in zip(*results, strict=True))
    assert not any(g[66:].any() for g in results[0][1:])


def test_empty_dimensions(backend: str, device: torch.device) -> None:
    for rows, shape in ((0, (4, 3, 2, 5)), (9, (4, 0, 2, 5)), (9, (4, 3, 2, 0))):
        values = make_inputs(rows, shape, torch.float32, device)
        seq_pos = positions((rows,), device)
        if rows:
            check(values, seq_pos, backend)
        else:
            args = leaves(values)
            y = ssd_scan(*args, seq_pos, backend=backend)
            assert y.shape == (0, 4, 3)
            assert not any(g.any() for g in gradients(y, args, torch.ones_like(y)))
        none = torch.zeros(0, dtype=torch.int64, device=device)
        states = ssd_state(*values[:4], seq_pos, none, backend=backend)
        assert states.shape == (0, *values[0].shape[1:], shape[3])


@pytest.mark.parametrize("step", [0.0, 1e-6, 30.0, 1e4])
def test_extreme_steps(backend: str, device: torch.device, step: float) -> None:
    """Results stay finite and right without decay, and with decays that underflow."""
    for dtype, loose in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        if dtype == torch.float64 and backend == "triton":
            continue
        values, seq_pos = make_inputs(45, SMALL, dtype, device), positions((40, 5), device)
        values[1].fill_(step)
        check(values, seq_pos, backend)
        # The decays of small steps between large ones are differences of large sums.
        values[1][::3] = 0.1
        check(values, seq_pos, backend, tolerance=loose)
        values[2].fill_(-1e3)
        check(values, seq_pos, backend, tolerance=loose)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("index", [0, 1, 3, 4, 6], ids=["x", "dt", "B", "C", "grad"])
def test_nan_and_infinity_stay_in_their_sequence(
    backend: str, device: torch.device, index: int, dtype: torch.dtype, value: float
) -> None:
    """Neighbours share chunks with the sequence, which spans two chunks."""
    seq_pos, last = positions((10, 60, 10), device), torch.tensor([9, 69, 79], device=device)
    values = make_inputs(80, SMALL, dtype, device)
    grad, results = random_grad(values), []
    for with_nan in (False, True):
        if with_nan:
            (values + [grad])[index][14] = value
        args = leaves(values)
        y = ssd_scan(*args, seq_pos, backend=backend)
        state = ssd_state(*values[:4], seq_pos, last, backend=backend)
        results.append((y, state, gradients(y, args, grad)))
    (clean, states, wanted), (y, state, grads) = results
    reaches_state = index in (0, 1, 3)
    rows = range(14, 70 if reaches_state else 15 if index == 4 else 14)
    bad = (~y.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    assert bad == list(rows)
    outside = [t for t in range(80) if t not in rows]
    assert_close(y[outside], clean[outside].double(), tolerance=1e-6)
    assert state.isfinite().flatten(1).all(1).tolist() == [True, not reaches_state, True]
    assert_close(state[[0, 2]], states[[0, 2]].double(), tolerance=1e-6)
    others = [*range(10), *range(70, 80)]
    for name, g, want in zip(NAMES, grads, wanted, strict=True):
        if name not in ("A", "D"):
            assert_close(g[others], want[others].double(), name=name, tolerance=1e-6)
    assert not all(g[14].isfinite().all() for g in grads if len(g) == 80)


def test_ten_thousand_tokens_in_float32() -> None:
    values = make_inputs(10_000, (2, 4, 1, 6), torch.float32)
    # One head decays over thousands of tokens, the other within a few.
    values[2].copy_(torch.tensor([-1e-3, -8.0]))
    check(values, positions((10_000,)), "torch")


def test_equals_the_scan_of_transformers() -> None:
    """Compares with the Nemotron-H scan of transformers on a batch of equal lengths."""
    from transformers.models.nemotron_h import modeling_nemotron_h

    values = make_inputs(150, (4, 8, 2, 6), torch.float32)
    args, their_args = leaves(values), leaves(values)
    x, dt, A, B, C, D = their_args
    x, dt, B, C = (t.unflatten(0, (3, 50)) for t in (x, dt, B, C))
    wanted = modeling_nemotron_h.mamba2_chunk_scan(x, dt, A, B, C, chunk_size=16, D=D).flatten(0, 1)
    y = ssd_scan(*args, positions((50,) * 3))
    assert_close(y, wanted.double(), tolerance=3e-6)
    grad = random_grad(values)
    pairs = zip(gradients(y, args, grad), gradients(wanted, their_args, grad), strict=True)
    for name, (got, want) in zip(NAMES, pairs, strict=True):
        assert_close(got, want.double(), name=name, tolerance=2e-5)


def test_the_state_has_no_gradient() -> None:
    args, seq_pos = leaves(make_inputs(9, SHAPES[0])), positions((9,))
    state = torch.ops.dragkit.ssd_state_fwd.default
    torch.library.opcheck(
        state, (*(t.detach() for t in args[:4]), seq_pos, seq_pos[[8]].long(), False)
    )
    with pytest.raises(ValueError, match="ssd_state: this op has no gradient"):
        ssd_state(*args[:4], seq_pos, torch.tensor([8]))
    with torch.no_grad():
        assert not ssd_state(*args[:4], seq_pos, torch.tensor([8])).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(9, 4)}, r"x must have shape \[\*, \*, \*\], got \[9, 4\]"),
        ({"dt": torch.zeros(9, 3)}, r"dt must have shape \[9, 4\], got \[9, 3\]"),
        ({"dt": torch.zeros(9, 4).bfloat16()}, "dt must be float32 or float64"),
        ({"A": torch.zeros(3)}, r"A must have shape \[4\], got \[3\]"),
        ({"B": torch.zeros(8, 2, 5)}, r"B must have shape \[9, \*, \*\]"),
        ({"B": torch.zeros(9, 3, 5)}, r"multiple of groups, got x \(9, 4, 3\) and B \(9, 3"),
        ({"C": torch.zeros(9, 2, 4)}, r"C must have shape \[9, 2, 5\]"),
        ({"D": torch.zeros(4, 1)}, r"D must have shape \[4\]"),
        ({"x": torch.zeros(9, 4, 3).long()}, "x must be floating point"),
        ({"seq_pos": torch.zeros(9)}, "seq_pos must be int32"),
        ({"seq_pos": torch.zeros(8).int()}, r"seq_pos must have shape \[9\], got \[8\]"),
    ],
)
def test_wrong_arguments(change: dict[str, Tensor], message: str) -> None:
    values = dict(zip(NAMES, make_inputs(9, SHAPES[0], torch.float32), strict=True))
    with pytest.raises(ValueError, match=f"ssd_scan: .*{message}"):
        ssd_scan(**{**values, "seq_pos": positions((9,)), **change})
    seq_pos = positions((9,))
    for last, message in (
        (seq_pos, "last_row must be int64"),
        (seq_pos[None], "last_row must have"),
    ):
        with pytest.raises(ValueError, match=message):
            ssd_state(*make_inputs(9, SHAPES[0])[:4], seq_pos, last)


@pytest.mark.triton
@pytest.mark.parametrize(("dtype", "rows"), [(torch.float16, 193), (torch.float32, 97)])
def test_the_kernels_keep_one_state_for_each_chunk(dtype, rows):
    states = pytest.importorskip("dragkit_kernels.ssd_scan.states")
    decays = pytest.importorskip("dragkit_kernels.ssd_scan.decays")
    x, dt, A, B, *_ = make_inputs(rows, (4, 3, 2, 5), dtype)
    scan = states.ScanInputs.prepare(x, dt, A, B, positions([rows]), decays.scan_tile(x, B))
    kept = states.chunk_states(scan)
    assert len(kept) == -(-rows // scan_chunk(dtype.itemsize)) == 4
    assert kept.dtype == torch.float32 and kept[0].numel() == 4 * 3 * 5
