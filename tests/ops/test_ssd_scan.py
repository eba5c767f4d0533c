"""The packed Mamba-2 scan against the recurrence, token by token in float64."""

from __future__ import annotations

import pytest
import torch

from dragkit_kernels import ssd_scan, ssd_state
from dragkit_kernels.ssd_scan import slabs
from dragkit_kernels.ssd_scan.reference import ssd_scan_ref
from dragkit_kernels.ssd_scan.reference_backward import ssd_scan_bwd_ref
from dragkit_kernels.testing import assert_close, gradients, leaves
from tests.ops.ssd_scan_cases import (
    NAMES,
    ORDERS,
    SHAPES,
    check,
    make_inputs,
    positions,
    recurrence,
)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_states_at_the_ends(dtype: torch.dtype) -> None:
    for lengths in ORDERS:
        values, position = make_inputs(sum(lengths), SHAPES[0], dtype), positions(lengths)
        last = torch.tensor(lengths).cumsum(0)[torch.randperm(len(lengths))] - 1
        state = ssd_state(*values[:4], position, last)
        assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        assert_close(state, recurrence(values, position)[1][last], tolerance=tolerance)


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
