"""Packed Mamba-2 layers against those of transformers: the scan, and a step of one layer."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import NemotronHConfig
from transformers.models.nemotron_h import modeling_nemotron_h
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from bench.measure import DEVICE, Contender, check_agreement
from bench.results import Comparison
from dragkit.generator.nemotron_h import make_pack, mamba_ops
from dragkit.generator.nemotron_h.mixer import mamba_mixer
from dragkit_kernels import ssd_scan

pytestmark = pytest.mark.timeout(1800)
_CHUNK = 128
_LIBRARY = "transformers without mamba-ssm"


class Shape(NamedTuple):
    """Sequences of equal length, so that transformers needs no padding either."""

    sequences: int
    length: int
    heads: int
    width: int
    groups: int
    states: int


# The bundled generator on a batch of demo prompts, and a layer of the 30B.
SHAPES = {"tiny": Shape(16, 170, 3, 32, 1, 16), "30B": Shape(1, 1024, 64, 64, 8, 128)}


def _scan_inputs(shape: Shape) -> list[Tensor]:
    """x, dt, A, B, C and D as batches [B, L, ...]."""
    draw = torch.Generator().manual_seed(0)
    rows = (shape.sequences, shape.length)
    x = torch.randn(*rows, shape.heads, shape.width, generator=draw)
    dt = torch.rand(*rows, shape.heads, generator=draw)
    a = -torch.rand(shape.heads, generator=draw)
    b, c = torch.randn(2, *rows, shape.groups, shape.states, generator=draw)
    d = torch.randn(shape.heads, generator=draw)
    return [t.to(DEVICE) for t in (x, dt, a, b, c, d)]


@pytest.mark.parametrize("name", ["tiny", pytest.param("30B", marks=pytest.mark.full)])
def test_scan(name: str, timed: Callable[..., None]) -> None:
    """Forward and backward of the scan, with the gradients of all its inputs but A and D."""
    shape = SHAPES[name]
    x, dt, a, b, c, d = _scan_inputs(shape)
    leaves = [t.requires_grad_() for t in (x, dt, b, c)]
    packed = [t.detach().flatten(0, 1).clone().requires_grad_() for t in leaves]
    seq_pos = torch.arange(shape.length, dtype=torch.int32, device=DEVICE).repeat(shape.sequences)
    grad = torch.randn_like(x)

    def ours() -> list[Tensor]:
        x, dt, b, c = packed
        y = ssd_scan(x, dt, a, b, c, d, seq_pos)
        return [y, *torch.autograd.grad(y, packed, grad.flatten(0, 1))]

    def library() -> list[Tensor]:
        x, dt, b, c = leaves
        y = modeling_nemotron_h.mamba2_chunk_scan(x, dt, a, b, c, _CHUNK, D=d)
        return [y, *torch.autograd.grad(y, leaves, grad)]

    def mamba_ssm() -> list[Tensor]:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        x, dt, b, c = leaves
        y = mamba_chunk_scan_combined(x, dt, a, b, c, _CHUNK, D=d)
        return [y, *torch.autograd.grad(y, leaves, grad)]

    contenders = [Contender("dragkit", ours, peer=False), Contender(_LIBRARY, library)]
    tolerances = {_LIBRARY: 1e-4}
    if DEVICE.type == "cuda" and find_spec("mamba_ssm"):
        contenders.append(Contender("mamba-ssm", mamba_ssm))
        tolerances["mamba-ssm"] = 5e-3  # its products are in tf32
    for peer in contenders[1:]:
        tensors = zip(["y", "x", "dt", "B", "C"], ours(), peer.run(), strict=True)
        for tensor, mine, theirs in tensors:
            check_agreement(
                f"{peer.name}: {tensor}", mine, theirs.flatten(0, 1), tolerances[peer.name]
            )
    title = f"Mamba-2 scan, {name} widths"
    comparison = Comparison(title, shape._asdict(), [], questions=shape.sequences)
    timed(comparison, contenders, DEVICE)


def _mixer() -> nn.Module:
    """A frozen layer of the 30B with random weights."""
    torch.manual_seed(0)
    config = NemotronHConfig(
        hybrid_override_pattern="M",
        hidden_size=2688,
        mamba_num_heads=64,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=8,
        conv_kernel=4,
        chunk_size=_CHUNK,
    )
    mixer = NemotronHMamba2Mixer(config, 0).requires_grad_(False)
    nn.init.normal_(mixer.dt_bias)
    # transformers floors dt at the minimum of its initialisation. The 30B has no such limit.
    mixer.time_step_limit = (0.0, float("inf"))
    return mixer.to(DEVICE)


def _step(name: str) -> Callable[[Tensor], Tensor]:
    """Forward and backward of the layer. The step maps float [T, M] to its gradient."""
    mixer, ops = _mixer(), mamba_ops("dragkit")

    def step(hidden: Tensor) -> Tensor:
        if name == "dragkit":
            length = torch.tensor([len(hidden)], device=hidden.device)
            pack = make_pack(length, len(hidden), len(hidden))
            y, _ = mamba_mixer(mixer, hidden, pack, ops)
        else:
            y = mixer(hidden[None])[0]
        (gradient,) = torch.autograd.grad(y.square().mean(), hidden)
        return gradient

    return step


def _process_mib(field: str) -> float:
    """A field of /proc/self/status in MiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"^{field}:\s+(\d+)", status, re.MULTILINE)[1]) / 1024


def peak_of_step(name: str, tokens: int) -> float:
    """MiB that one step takes above what the process held before. Needs a fresh process."""
    step = _step(name)
    hidden = torch.randn(tokens, 2688, device=DEVICE, requires_grad=True)
    # The first call allocates what libraries cache for later calls.
    step(hidden[:64].detach().requires_grad_())
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(hidden)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = _process_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    step(hidden)
    return _process_mib("VmHWM") - before


def _peak_in_new_process(name: str, tokens: int) -> float:
    # A new process, because freed memory of earlier calls would hide the step's own.
    code = f"import bench.bench_mamba as b; print(b.peak_of_step({name!r}, {tokens}))"
    return float(subprocess.check_output([sys.executable, "-c", code], text=True).split()[-1])


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_layer(timed: Callable[..., None]) -> None:
    """A training step of one layer at the 30B's widths, 1,024 tokens, and its peak memory."""
    tokens = 1024
    hidden = torch.randn(tokens, 2688, device=DEVICE, requires_grad=True)
    ours, library = _step("dragkit"), _step("library")
    check_agreement("gradient of the layer", ours(hidden), library(hidden), 1e-4)
    about: dict[str, object] = {"tokens": tokens}
    for name in ("dragkit", "library"):
        about[f"peak MiB, {name}"] = round(_peak_in_new_process(name, tokens))
    about["ratio of peaks"] = round(about["peak MiB, library"] / about["peak MiB, dragkit"], 2)
    contenders = [
        Contender("dragkit", lambda: ours(hidden), peer=False),
        Contender(_LIBRARY, lambda: library(hidden)),
    ]
    title = "Mamba-2 layer of the 30B, forward and backward"
    timed(Comparison(title, about, [], questions=1), contenders, DEVICE)
