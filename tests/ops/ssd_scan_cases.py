"""Inputs of the packed scan, and the recurrence that says what it must give."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dragkit_kernels import ssd_scan
from dragkit_kernels.testing import assert_close, gradients, leaves

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
