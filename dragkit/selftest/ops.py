"""Errors of every op against float64, forward and backward, by type."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from dragkit.selftest.outcome import Outcome, require
from dragkit_kernels.op_cases import LARGE, OPS, SMALL, given, inputs, run
from dragkit_kernels.testing import TOLERANCE

_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def _error_ratio(actual: Tensor, expected: Tensor) -> float:
    """RMS error relative to the RMS of the expected values."""
    if not expected.numel():
        return 0.0
    error = (actual.double() - expected).square().mean().sqrt()
    return float(error / expected.square().mean().sqrt().clamp(min=1e-12))


def op_errors(outcome: Outcome, backend: str) -> None:
    """Runs every op twice in each type, and once in float64.

    Args:
        outcome: counts the cases.
        backend: "torch" on the CPU, or "triton" on the GPU.
    """
    device = torch.device("cuda" if backend == "triton" else "cpu")
    sizes = LARGE if backend == "triton" else SMALL
    worst: dict[torch.dtype, tuple[float, str]] = defaultdict(lambda: (0.0, "none"))
    for name in OPS:
        given_inputs = given(sizes, device)
        for dtype in _TYPES:
            with outcome.case(f"{name}, {dtype}"):
                values = inputs(name, sizes, given_inputs, dtype)
                first = run(name, values, given_inputs, backend, grad_dtype=dtype)
                again = run(name, values, given_inputs, backend, grad_dtype=dtype)
                same = all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
                require(same, "a second run gives other bits")
                exact = [x.double() for x in values]
                expected = run(name, exact, given_inputs, "torch", grad_dtype=dtype)
                ratio = max(map(_error_ratio, first, expected))
                worst[dtype] = max(worst[dtype], (ratio, name))
                limit = TOLERANCE[dtype]
                require(ratio <= limit, f"RMS error ratio {ratio:.2e} > {limit:.0e}")
    for dtype in _TYPES:
        ratio, name = worst[dtype]
        outcome.notes.append(
            f"worst RMS error ratio in {str(dtype).removeprefix('torch.')}: {ratio:.1e} ({name})"
        )
