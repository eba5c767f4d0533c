"""Ops of packed sequences at the 30B model's sizes on a GPU, and interpreted at small sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dragkit_kernels import causal_conv, gated_rms_norm, ssd_scan
from dragkit_kernels.backend import INTERPRETED
from dragkit_kernels.testing import assert_close, leaves

pytestmark = pytest.mark.triton
LOW = torch.float16 if INTERPRETED else torch.bfloat16
LENGTHS = (3, 70, 1, 20) if INTERPRETED else (170, 1, 4096, 333, 64, 900, 2)
REPEATS = 2 if INTERPRETED else 20
HEADS, WIDTH, GROUPS, STATES = (4, 16, 2, 16) if INTERPRETED else (64, 64, 8, 128)
NAMES = ("causal_conv", "gated_rms_norm", "ssd_scan")


def positions(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]).to(device)


def inputs(name: str, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Float inputs of an op. dt, A and D stay float32, as in training."""
    draw = torch.Generator().manual_seed(0)
    rows, inner = sum(LENGTHS), HEADS * WIDTH

    def random(*shape: int, as_dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, as_dtype)

    if name == "causal_conv":
        channels = inner + 2 * GROUPS * STATES
        return [random(rows, channels), random(channels, 4), random(channels)]
    if name == "gated_rms_norm":
        return [random(rows, inner), random(rows, inner), random(inner)]
    dt = torch.rand(rows, HEADS, generator=draw).to(device)
    A = -torch.logspace(-3, 0, HEADS).to(device)
    B_and_C = [0.2 * random(rows, GROUPS, STATES) for _ in range(2)]
    x, D = random(rows, HEADS, WIDTH), random(HEADS, as_dtype=torch.float32)
    return [x, dt, A, *B_and_C, D]


def run_op(name: str, values: list[Tensor], seq_pos: Tensor, backend: str) -> Tensor:
    if name == "causal_conv":
        return causal_conv(*values, seq_pos, backend=backend)
    if name == "gated_rms_norm":
        return gated_rms_norm(*values, groups=GROUPS, eps=1e-5, backend=backend)
    return ssd_scan(*values, seq_pos, backend=backend)


def output_and_gradients(
    name: str, values: list[Tensor], seq_pos: Tensor, backend: str
) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    args = leaves(values)
    out = run_op(name, args, seq_pos, backend)
    grad = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(LOW).to(out)
    return [out.detach(), *torch.autograd.grad(out, args, grad)]


@pytest.mark.parametrize("name", NAMES)
def test_repeats_are_bit_equal(device: torch.device, name: str) -> None:
    values, seq_pos = inputs(name, device, LOW), positions(LENGTHS, device)
    first = output_and_gradients(name, values, seq_pos, "triton")
    stream = None if INTERPRETED else torch.cuda.Stream()
    noise = torch.randn(64 if INTERPRETED else 4096, 64, device=device)
    for repeat in range(1, REPEATS):
        if stream is not None and repeat % 2:
            with torch.cuda.stream(stream):
                for _ in range(20):
                    noise = noise @ (noise.t() @ noise).tanh()
        again = output_and_gradients(name, values, seq_pos, "triton")
        assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize("name", NAMES)
def test_errors_are_at_most_twice_those_of_pytorch(
    device: torch.device, name: str, dtype: torch.dtype
) -> None:
    """Compares RMS errors against float64, with a margin of one unit in the last place.

    The scan's kernels multiply float16 or bfloat16 operands, while the PyTorch path multiplies in
    float32. For the scan the tolerances of the other tests apply.
    """
    torch.backends.cuda.matmul.allow_tf32 = False  # the fixture in conftest.py restores it
    values, seq_pos = inputs(name, device, dtype), positions(LENGTHS, device)
    exact = output_and_gradients(name, [x.double() for x in values], seq_pos, "torch")
    outputs = (
        output_and_gradients(name, values, seq_pos, backend) for backend in ("triton", "torch")
    )
    for index, (x, y, z) in enumerate(zip(*outputs, exact, strict=True)):
        scale = float(z.square().mean().sqrt())
        ours, theirs = (float((a.double() - z).square().mean().sqrt()) for a in (x, y))
        unit = scale * torch.finfo(x.dtype).eps
        if name == "ssd_scan" and dtype == LOW:
            unit = scale * (8e-3 if index else 4e-3)
        assert ours <= 2 * theirs + unit, f"{name} {index}: {ours / scale:.1e}"


@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences_equal_sequences_alone(device: torch.device, name: str) -> None:
    values, seq_pos = inputs(name, device, LOW), positions(LENGTHS, device)
    whole = run_op(name, values, seq_pos, "triton")
    rows = sum(LENGTHS)
    begin = 0
    for length in LENGTHS:
        part = slice(begin, begin + length)
        part_values = [x[part].contiguous() if x.shape[0] == rows else x for x in values]
        alone = run_op(name, part_values, seq_pos[part].contiguous(), "triton")
        assert_close(whole[part], alone.double(), name=f"{name} from {begin}")
        begin += length


@pytest.mark.parametrize("name", ["causal_conv", "gated_rms_norm"])
def test_beyond_the_range_of_an_int32(device: torch.device, name: str) -> None:
    """Rows beyond 2^31 elements equal the same rows near the start."""
    if not INTERPRETED and torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free device memory")
    columns = 64 if INTERPRETED else 4096
    period = 8
    rows = 64 if INTERPRETED else (2**31 // columns // period + 4) * period
    draw = torch.Generator().manual_seed(1)
    pattern = torch.randn(period, columns, generator=draw).to(device, LOW)
    x = pattern.repeat(rows // period, 1)
    seq_pos = torch.arange(period, dtype=torch.int32, device=device).repeat(rows // period)
    weight = torch.randn(columns, 4, generator=draw).to(device, LOW)

    def run(x: Tensor, seq_pos: Tensor) -> Tensor:
        if name == "causal_conv":
            return causal_conv(x, weight, None, seq_pos, backend="triton")
        return gated_rms_norm(x, x, weight[:, 0], groups=1, eps=1e-5, backend="triton")

    with torch.no_grad():
        whole = run(x, seq_pos)
        small = run(pattern.contiguous(), seq_pos[:period].contiguous())
    assert torch.equal(whole[:period], small) and torch.equal(whole[-period:], small)
