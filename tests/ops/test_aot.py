"""Ahead-of-time compilation for Hopper and Blackwell, and the check against limits."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from dragkit_kernels import aot
from dragkit_kernels.aot import Usage, all_specs
from dragkit_kernels.backend import INTERPRETED
from dragkit_kernels.launch import ResourceLimits

FITS = Usage(
    registers=64, spills=0, stack_bytes=0, shared_bytes=1024, vector_loads=2, mma_instructions=1
)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels cannot be compiled")
def test_the_command_checks_a_kernel_against_its_limits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compiles one small kernel. `make test` runs the command over all kernels."""
    spec = next(s for s in all_specs() if s.kernel.fn.__name__ == "_logistic_noise_fwd_kernel")
    for registers, status in ((spec.limits.registers, 0), (1, 1)):
        chosen = spec._replace(limits=spec.limits._replace(registers=registers))
        monkeypatch.setattr(aot, "all_specs", lambda chosen=chosen: iter([chosen]))
        assert aot.main([]) == status
        output = capsys.readouterr().out
        assert "sm_90" in output and "sm_100" in output
        assert "1 kernels in 1 configurations x 2 architectures = 2 compiled" in output
        assert f"over limits {2 * status}" in output
        assert ("registers > 1" in output) == bool(status)


@pytest.mark.skipif(INTERPRETED, reason="interpreted functions have no argument types")
def test_specs_name_every_argument() -> None:
    specs = list(all_specs())
    assert specs
    for spec in specs:
        assert {*spec.types, *spec.constants} == set(spec.kernel.arg_names), spec
        assert len(spec.types) + len(spec.constants) == len(spec.kernel.arg_names), spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"registers": 65}, "registers > 64"),
        ({"spills": 1}, "spills"),
        ({"stack_bytes": 8, "shared_bytes": 1025}, "stack, shared > 1024"),
        ({"vector_loads": 1, "mma_instructions": 0}, "vector loads < 2, mma < 1"),
    ],
)
def test_exceeded_limits_are_named(change: dict[str, int], message: str) -> None:
    limits = ResourceLimits(registers=64, shared_bytes=1024, vector_loads=2, mma_instructions=1)
    spec = next(all_specs())._replace(limits=limits)
    assert FITS._replace(**change).over_limits(spec) == message


def test_occupancy_follows_the_scarcest_resource() -> None:
    assert FITS.occupancy(num_warps=4) == 0.5
    assert FITS._replace(registers=32).occupancy(num_warps=4) == 1.0
    assert FITS._replace(registers=32, shared_bytes=50_000).occupancy(num_warps=4) == 0.25
