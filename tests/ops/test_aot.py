"""Every kernel compiles for Hopper and Blackwell within its budget; no GPU is involved."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from dragkit_kernels import aot
from dragkit_kernels.aot import Usage, all_specs
from dragkit_kernels.backend import INTERPRETED
from dragkit_kernels.launch import Budget

FITS = Usage(registers=64, spills=0, stack=0, shared=1024, wide_loads=2, products=1)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels cannot be compiled")
def test_the_command_holds_a_kernel_to_its_budget(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One small kernel, really compiled; `make test` runs the command over all of them."""
    spec = next(s for s in all_specs() if s.kernel.fn.__name__ == "_logistic_noise_fwd_kernel")
    for registers, status in ((spec.budget.registers, 0), (1, 1)):
        chosen = spec._replace(budget=spec.budget._replace(registers=registers))
        monkeypatch.setattr(aot, "all_specs", lambda chosen=chosen: iter([chosen]))
        assert aot.main([]) == status
        said = capsys.readouterr().out
        assert "sm_90" in said and "sm_100" in said
        assert "1 kernels in 1 configurations x 2 architectures = 2 compiled" in said
        assert f"over budget {2 * status}" in said
        assert ("registers > 1" in said) == bool(status)


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
        ({"stack": 8, "shared": 1025}, "stack, shared > 1024"),
        ({"wide_loads": 1, "products": 0}, "wide loads < 2, products < 1"),
    ],
)
def test_what_is_over_a_budget_is_named(change: dict[str, int], message: str) -> None:
    budget = Budget(registers=64, shared=1024, wide_loads=2, products=1)
    spec = next(all_specs())._replace(budget=budget)
    assert FITS._replace(**change).excess(spec) == message


def test_occupancy_is_that_of_the_scarcest_resource() -> None:
    assert FITS.occupancy(num_warps=4) == 0.5
    assert FITS._replace(registers=32).occupancy(num_warps=4) == 1.0
    assert FITS._replace(registers=32, shared=50_000).occupancy(num_warps=4) == 0.25
