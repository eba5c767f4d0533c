"""The packed Mamba-2 scan against the recurrence, token by token in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dragkit_kernels import ssd_scan, ssd_state
from dragkit_kernels.ssd_scan import slabs
from dragkit_kernels.ssd_scan.reference import ssd_scan_ref
from dragkit_kernels.ssd_scan.reference_backward import ssd_scan_bwd_ref
from dragkit_kernels.testing import assert_close, gradients, leaves, strided_like

NAMES = ("x", "dt", "rate", "into", "out_of", "skip")
FORWARD = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
CHUNK = 32
# Around a chunk of the sizes below, in several orders.
LENGTHS = (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)
ORDERS = (LENGTHS, LENGTHS[::-1], (33, 1, 101, 31, 2, 32), (1, 1, 1, 101, 2, 2, 33))
# Heads, head width, groups, states.
SHAPES = ((4, 3, 2, 5), (3, 7, 3, 1), (6, 1, 1, 64), (1, 5, 1, 3))


def positions(lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths] or [torch.zeros(0)]).int()


def make_inputs(
    rows: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """x, dt, rate, into, out_of, skip; dt is never of low precision."""
    heads, width, groups, states = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = (
        *((rows, heads, width), (rows, heads), (heads,)),
        *((rows, groups, states), (rows, groups, states), (heads,)),
    )
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]
    drawn[1] = F.softplus(drawn[1] - 1)
    drawn[2] = -4 * torch.rand(heads, generator=generator, dtype=torch.float64) - 0.02
    full = torch.float64 if dtype == torch.float64 else torch.float32
    return [t.to(full if name == "dt" else dtype) for name, t in zip(NAMES, drawn, strict=True)]


def recurrence(inputs: list[Tensor], position: Tensor) -> tuple[Tensor, Tensor]:
    """y and all states [T, H, P, N], in float64."""
    x, dt, rate, into, out_of, skip = (t.double() for t in inputs)
    heads, width = x.shape[1:]
    into, out_of = (t.repeat_interleave(heads // t.shape[1], 1) for t in (into, out_of))
    state = torch.zeros(heads, width, into.shape[2], dtype=torch.float64)
    states = [state.unsqueeze(0)[:0]]
    for t, place in enumerate(position.tolist()):
        if place == 0:
            state = torch.zeros_like(state)
        kept = (rate * dt[t]).exp().view(-1, 1, 1)
        state = state * kept + (dt[t, :, None] * x[t]).unsqueeze(2) * into[t].unsqueeze(1)
        states.append(state.unsqueeze(0))
    states = torch.cat(states)
    y = (states * out_of.unsqueeze(2)).sum(3) + skip.unsqueeze(1) * x
    return y, states


def check(
    inputs: list[Tensor],
    position: Tensor,
    grad: Tensor | None = None,
    *,
    tolerance: float | None = None,
) -> None:
    """Result and every gradient against the recurrence."""
    exact, tried = leaves([t.double() for t in inputs]), leaves(inputs)
    expected, _ = recurrence(exact, position)
    actual = ssd_scan(*tried, position)
    assert actual.dtype == inputs[0].dtype
    assert_close(actual, expected, name="y", tolerance=tolerance or FORWARD[actual.dtype])
    if grad is None:
        grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(
            actual.dtype
        )
    got, wanted = gradients(actual, tried, grad), gradients(expected, exact, grad.double())
    for name, t, g, want in zip(NAMES, inputs, got, wanted, strict=True):
        assert g.dtype == t.dtype, name
        assert_close(g, want, name=f"d{name}", tolerance=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lengths", ORDERS, ids=str)
def test_equals_the_recurrence(lengths: tuple[int, ...], shape: tuple[int, ...]) -> None:
    check(make_inputs(sum(lengths), shape), positions(lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 64, 2, 16), (2, 96, 1, 7), (2, 1, 1, 257)], ids=str)
def test_dtypes_and_widths(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(make_inputs(sum(ORDERS[2]), shape, dtype), positions(ORDERS[2]))


@pytest.mark.parametrize("bytes_of_a_slab", [1, 200_000])
@pytest.mark.parametrize("lengths", [ORDERS[0], (230,)], ids=str)
def test_many_slabs(
    bytes_of_a_slab: int, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slabs, "SLAB_BYTES", bytes_of_a_slab)
    inputs, position = make_inputs(sum(lengths), SHAPES[0]), positions(lengths)
    sizes = slabs.Sizes.of(inputs[0], inputs[3])
    assert len(list(sizes.slabs())) > 1
    check(inputs, position)
    last = torch.arange(sum(lengths))
    assert_close(ssd_state(*inputs[:4], position, last), recurrence(inputs, position)[1])


@pytest.mark.parametrize("chunk", [1, 2, 8, 64, 128])
def test_the_chunk_changes_no_result(chunk: int) -> None:
    inputs, position = make_inputs(sum(ORDERS[3]), SHAPES[0]), positions(ORDERS[3])
    assert_close(ssd_scan_ref(*inputs, position, chunk=chunk), ssd_scan(*inputs, position))
    tried = leaves(inputs)
    y = ssd_scan(*tried, position)
    grad = torch.randn_like(y)
    got = ssd_scan_bwd_ref(grad, *inputs, position, [True] * 6, chunk=chunk)
    for name, g, want in zip(NAMES, got, gradients(y, tried, grad), strict=True):
        assert_close(g, want, name=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_pack_equals_its_sequences_alone(dtype: torch.dtype) -> None:
    for lengths in ORDERS:
        inputs, position = make_inputs(sum(lengths), SHAPES[0], dtype), positions(lengths)
        together = leaves(inputs)
        y = ssd_scan(*together, position)
        grad = torch.randn_like(y)
        got = gradients(y, together, grad)
        by_row = [t.split(lengths) if t.shape[0] == len(y) else None for t in inputs]
        alone = []
        for i, n in enumerate(lengths):
            own = leaves([t if rows is None else rows[i] for t, rows in zip(inputs, by_row)])  # noqa: B905
            part = ssd_scan(*own, positions((n,)))
            alone.append((part, *gradients(part, own, grad.split(lengths)[i])))
        for name, actual, parts in zip(
            ("y", *NAMES), (y, *got), zip(*alone, strict=True), strict=True
        ):
            whole = sum(parts) if name in ("rate", "skip") else torch.cat(parts)
            tolerance = 1e-11 if dtype == torch.float64 else 1e-5
            assert_close(actual, whole.double(), name=name, tolerance=tolerance)


def test_padding_rows_change_nothing() -> None:
    """A buffer of fixed size: every row behind the last sequence is one of its own."""
    lengths = (33, 2, 40)
    inputs, position = make_inputs(200, SHAPES[0]), positions((*lengths, *([1] * 125)))
    grad = torch.randn_like(inputs[0])
    grad[75:] = 0
    padded, short = leaves(inputs), leaves([t[:75] if t.shape[0] == 200 else t for t in inputs])
    y, wanted = ssd_scan(*padded, position), ssd_scan(*short, position[:75])
    assert_close(y[:75], wanted)
    assert y.isfinite().all()
    pairs = zip(gradients(y, padded, grad), gradients(wanted, short, grad[:75]), strict=True)
    for name, (got, want) in zip(NAMES, pairs, strict=True):
        assert_close(got[:75], want, name=name)
        assert not got[75:].any(), name


def test_no_rows_and_no_heads_width_or_states() -> None:
    for rows, shape in ((0, (4, 3, 2, 5)), (9, (4, 0, 2, 5)), (9, (4, 3, 2, 0))):
        inputs, position = make_inputs(rows, shape), torch.arange(rows).int()
        check(inputs, position)
        last = torch.tensor([rows - 1] * (rows > 0)).long()
        wanted = recurrence(inputs, position)[1][last]
        assert torch.equal(ssd_state(*inputs[:4], position, last), wanted)
    inputs = make_inputs(9, SHAPES[0])
    none = torch.zeros(0, dtype=torch.int64)
    assert ssd_state(*inputs[:4], torch.arange(9).int(), none).shape == (0, 4, 3, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("step", [0.0, 1e-6, 30.0, 1e4])
def test_extreme_steps(step: float, dtype: torch.dtype) -> None:
    """No decay at all, or one that underflows: everything stays finite and right."""
    lengths = (70, 1, 40)
    inputs, position = make_inputs(sum(lengths), SHAPES[0], dtype), positions(lengths)
    inputs[1].fill_(step)
    check(inputs, position)
    # Small steps between large ones: their decays are differences of large sums.
    rough = 1e-9 if dtype == torch.float64 else 1e-3
    inputs[1][::3] = 0.1
    check(inputs, position, tolerance=rough)
    inputs[2].fill_(-1e3)
    check(inputs, position, tolerance=rough)


def test_ten_thousand_tokens_in_float32() -> None:
    inputs = make_inputs(10_000, (2, 4, 1, 6), torch.float32)
    # Slow and fast heads: a memory of thousands of tokens, and one of a few.
    inputs[2].copy_(torch.tensor([-1e-3, -8.0]))
    check(inputs, torch.arange(10_000).int())


def test_gradcheck() -> None:
    inputs = leaves(make_inputs(13, (4, 2, 2, 3)))
    position = positions((5, 1, 7))
    assert torch.autograd.gradcheck(lambda *t: ssd_scan(*t, position), inputs)


@pytest.mark.parametrize("place", range(6), ids=NAMES)
def test_each_gradient_alone(place: int) -> None:
    values, position = make_inputs(75, SHAPES[0]), positions((40, 35))
    every = leaves(values)
    grad = torch.randn_like(values[0])
    want = gradients(ssd_scan(*every, position), every, grad)[place]
    alone = [t.detach() for t in values]
    alone[place].requires_grad_()
    (got,) = gradients(ssd_scan(*alone, position), [alone[place]], grad)
    assert torch.equal(got, want)
    mask = [i == place for i in range(6)]
    found = torch.ops.dragkit.ssd_scan_bwd(grad, *values, position, mask, False)
    assert [t.numel() > 0 for t in found] == mask


def test_a_zero_gradient_gives_zeros() -> None:
    tried, position = leaves(make_inputs(75, SHAPES[0], torch.float32)), positions((40, 35))
    y = ssd_scan(*tried, position)
    assert not any(g.any() for g in gradients(y, tried, torch.zeros_like(y)))


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_states_at_the_ends(dtype: torch.dtype) -> None:
    for lengths in ORDERS:
        values, position = make_inputs(sum(lengths), SHAPES[0], dtype), positions(lengths)
        last = torch.tensor(lengths).cumsum(0)[torch.randperm(len(lengths))] - 1
        state = ssd_state(*values[:4], position, last)
        assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        assert_close(state, recurrence(values, position)[1][last], tolerance=tolerance)


def test_states_have_no_gradient() -> None:
    values = leaves(make_inputs(9, SHAPES[0]))
    arguments = (*values[:4], torch.arange(9).int(), torch.tensor([8]))
    with pytest.raises(ValueError, match="ssd_state: has no gradient"):
        ssd_state(*arguments)
    with torch.no_grad():
        assert not ssd_state(*arguments).requires_grad


def test_equals_the_librarys_scan() -> None:
    """That of transformers' Nemotron-H, over a batch of equal sequences."""
    from transformers.models.nemotron_h import modeling_nemotron_h

    batch, length, shape = 3, 50, (4, 8, 2, 6)
    values = make_inputs(batch * length, shape, torch.float32)
    tried, theirs = leaves(values), leaves(values)
    x, dt, rate, into, out_of, skip = theirs
    x, dt, into, out_of = (t.unflatten(0, (batch, length)) for t in (x, dt, into, out_of))
    wanted = modeling_nemotron_h.mamba2_chunk_scan(
        x, dt, rate, into, out_of, chunk_size=16, D=skip
    ).flatten(0, 1)
    y = ssd_scan(*tried, positions((length,) * batch))
    assert_close(y, wanted.double(), tolerance=3e-6)
    grad = torch.randn_like(y)
    pairs = zip(gradients(y, tried, grad), gradients(wanted, theirs, grad), strict=True)
    for name, (got, want) in zip(NAMES, pairs, strict=True):
        assert_close(got, want.double(), name=name, tolerance=2e-5)


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
