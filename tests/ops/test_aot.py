"""Every kernel compiles for Hopper and Blackwell within its budget; no GPU is involved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from dragkit_kernels.aot import Usage, all_specs
from dragkit_kernels.backend import INTERPRETED
from dragkit_kernels.launch import Budget

SIDE_FOLDER = os.environ.get("DRAGKIT_TRITON36")
FITS = Usage(registers=64, spills=0, stack=0, shared=1024, wide_loads=2)


def check(folder: Path, first_on_path: str | None = None) -> str:
    path = [*([first_on_path] if first_on_path else []), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    environment |= {"TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "dragkit_kernels.aot"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kernels_stay_within_their_budgets(tmp_path: Path) -> None:
    table = check(tmp_path)
    assert len(table.splitlines()) == 1 + 2 * len(list(all_specs()))
    assert "sm_90" in table and "sm_100" in table


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not SIDE_FOLDER, reason="DRAGKIT_TRITON36 names no folder with triton 3.6")
def test_the_older_triton_agrees(tmp_path: Path) -> None:
    assert " 3.6." in check(tmp_path, SIDE_FOLDER)


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
        ({"wide_loads": 1}, "wide loads < 2"),
    ],
)
def test_what_is_over_a_budget_is_named(change: dict[str, int], message: str) -> None:
    spec = next(all_specs())._replace(budget=Budget(registers=64, shared=1024, wide_loads=2))
    assert FITS._replace(**change).excess(spec) == message


def test_occupancy_is_that_of_the_scarcest_resource() -> None:
    assert FITS.occupancy(num_warps=4) == 0.5
    assert FITS._replace(registers=32).occupancy(num_warps=4) == 1.0
    assert FITS._replace(registers=32, shared=50_000).occupancy(num_warps=4) == 0.25
