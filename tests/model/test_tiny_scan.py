"""The scan that the shipped generator's training uses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.models.nemotron_h import modeling_nemotron_h

from dragkit.tiny.scan import chunk_scan, fast_scan
from tests.model.shipped import shipped

pytestmark = pytest.mark.usefixtures("one_thread")


def scan_by_recurrence(x, dt, a, b, c, d, bias) -> Tensor:  # noqa: ANN001
    """The definition, one token at a time, in float64."""
    x, dt, a, b, c, d, bias = (t.double() for t in (x, dt, a, b, c, d, bias))
    dt = torch.nn.functional.softplus(dt + bias)
    state = torch.zeros(x.shape[0], x.shape[2], x.shape[3], b.shape[-1], dtype=torch.float64)
    rows = []
    for t in range(x.shape[1]):
        gain = dt[:, t, :, None, None] * x[:, t, :, :, None] * b[:, t, :, None, :]
        state = state * (a * dt[:, t]).exp()[..., None, None] + gain
        rows.append((state * c[:, t, :, None, :]).sum(-1) + d[:, None] * x[:, t])
    return torch.stack(rows, 1)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 31])
def test_fast_scan_equals_the_recurrence(length: int) -> None:
    g = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, 3, 4, generator=g, requires_grad=True)
    dt, bias, d = (torch.randn(s, generator=g) for s in ((2, length, 3), (3,), (3,)))
    b, c = (torch.randn(2, length, 1, 5, generator=g) for _ in "bc")
    a = -torch.tensor([0.01, 1.0, 30.0])
    got = chunk_scan(x, dt, a, b, c, 8, D=d, dt_bias=bias, dt_limit=(0.0, math.inf))
    want = scan_by_recurrence(x, dt, a, b, c, d, bias)
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)
    probe = torch.randn(got.shape, generator=g)
    (grad,) = torch.autograd.grad((got * probe).sum(), x)
    (truth,) = torch.autograd.grad((want * probe).sum(), x)
    torch.testing.assert_close(grad, truth, rtol=1e-4, atol=1e-5)


def test_fast_scan_gives_the_model_the_same_logits_and_leaves_nothing_behind() -> None:
    model, _ = shipped()
    original = modeling_nemotron_h.mamba2_chunk_scan
    ids = torch.randint(8, 1024, (2, 75), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        with pytest.raises(ZeroDivisionError), fast_scan():
            assert modeling_nemotron_h.mamba2_chunk_scan is chunk_scan
            torch.testing.assert_close(model(ids, use_cache=False).logits, want, atol=1e-3, rtol=0)
            _ = 1 / 0
    assert modeling_nemotron_h.mamba2_chunk_scan is original


def test_scan_refuses_more_than_one_group() -> None:
    x, b = torch.zeros(1, 2, 2, 3), torch.zeros(1, 2, 2, 4)
    one = torch.ones(2)
    with pytest.raises(ValueError, match="one group"):
        chunk_scan(x, x[..., 0], -one, b, b, 8, D=one, dt_bias=one, dt_limit=(0.0, math.inf))
