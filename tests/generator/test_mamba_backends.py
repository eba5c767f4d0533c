"""`generator.mamba_backend`: our ops, their references, and stand-ins of mamba-ssm."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from dragkit.errors import ConfigError
from dragkit.generator.nemotron_h.backends import mamba_ops, sequence_numbers

POSITION = torch.tensor([0, 1, 2, 0, 0, 1, 2, 3], dtype=torch.int32)
NAMES = ("causal_conv1d", "mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton")
LAST = "mamba_ssm.ops.triton.ssd_combined"


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None):
    """The definition, [1, C, T], with the arguments of the package."""
    assert x.stride(1) == 1, "with seq_idx the package needs channels last"
    assert seq_idx.dtype == torch.int32 and activation == "silu"
    y = torch.zeros_like(x) + bias[:, None]
    taps, sequence = weight.shape[1], seq_idx[0]
    for t in range(x.shape[2]):
        for lag in range(min(taps, t + 1)):
            if sequence[t - lag] == sequence[t]:
                y[0, :, t] += weight[:, taps - 1 - lag] * x[0, :, t - lag]
    return torch.nn.functional.silu(y)


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, seq_idx=None):
    """The recurrence, [1, T, H, P], with the arguments of the package."""
    assert seq_idx.dtype == torch.int32 and chunk_size == 128
    _, length, heads, width = x.shape
    state, rows = torch.zeros(heads, width, B.shape[-1], dtype=x.dtype), []
    b, c = (m[0].repeat_interleave(heads // m.shape[2], 1) for m in (B, C))
    for t in range(length):
        if t and seq_idx[0, t] != seq_idx[0, t - 1]:
            state = torch.zeros_like(state)
        update = (dt[0, t, :, None] * x[0, t])[..., None] * b[t][:, None]
        state = state * (A * dt[0, t]).exp()[:, None, None] + update
        rows.append((state * c[t][:, None]).sum(-1) + D[:, None] * x[0, t])
    return torch.stack(rows)[None]


@pytest.fixture
def packages(monkeypatch):
    for name in (*NAMES, LAST):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["causal_conv1d"].causal_conv1d_fn = causal_conv1d_fn
    sys.modules[LAST].mamba_chunk_scan_combined = mamba_chunk_scan_combined


def test_sequence_numbers():
    assert sequence_numbers(POSITION).tolist() == [[0, 0, 0, 1, 2, 2, 2, 2]]
    assert sequence_numbers(POSITION).dtype == torch.int32
    assert sequence_numbers(POSITION[:0]).shape == (1, 0)


@pytest.mark.parametrize("name", ["reference", "mamba_ssm"])
def test_backends_agree(packages, name):
    torch.manual_seed(0)
    ours, other = mamba_ops("dragkit"), mamba_ops(name)
    wide = torch.randn(8, 11, dtype=torch.float64)
    x, weight, bias = wide[:, 2:8], torch.randn(6, 4).double(), torch.randn(6).double()
    convolved = [o.conv(x, weight, bias, POSITION) for o in (ours, other)]
    torch.testing.assert_close(*convolved)
    x = torch.randn(8, 4, 3, dtype=torch.float64)
    dt = torch.rand(8, 4, dtype=torch.float64)
    A, D = -torch.rand(4).double(), torch.randn(4).double()
    B, C = torch.randn(2, 8, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(*(o.scan(x, dt, A, B, C, D, POSITION) for o in (ours, other)))


def test_the_reference_backend_is_plain_pytorch():
    """Only plain PyTorch is differentiable twice; our ops are not."""
    ops = mamba_ops("reference")
    x = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4).double()
    assert torch.autograd.gradgradcheck(lambda x: ops.conv(x, weight, None, POSITION), x)
    dt, A = torch.rand(8, 4).double(), -torch.rand(4).double()
    B, C = torch.randn(2, 8, 2, 3).double()
    assert torch.autograd.gradgradcheck(
        lambda x: ops.scan(x.view(8, 4, 1) ** 2, dt, A, B, C, A, POSITION), x
    )


def test_a_package_that_cannot_be_imported_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    with pytest.raises(
        ConfigError, match=r"generator\.mamba_backend.*causal_conv1d.*leave generator"
    ):
        mamba_ops("mamba_ssm")
