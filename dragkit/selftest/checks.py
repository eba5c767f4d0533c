"""The checks of each tier."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from dragkit.selftest.bad_lines import bad_lines
from dragkit.selftest.damages import damages
from dragkit.selftest.failing_disks import failing_disks, kept_checkpoints
from dragkit.selftest.ops import op_errors
from dragkit.selftest.outcome import Outcome
from dragkit.selftest.rank_deaths import rank_deaths
from dragkit.selftest.refusals import refusals
from dragkit.selftest.resumes import phase_changes, resumes, resumes_elsewhere
from dragkit.selftest.saves import crash_points, disk_errors
from dragkit.selftest.stops import (
    closed_logs,
    kills,
    second_writers,
    stops,
    stops_anywhere,
    stops_while_importing,
)

_NO_GPU = "kernels on a GPU: this machine has no CUDA device. They are tested by tests/ops."


def checks(tier: str, root: Path) -> dict[str, Callable[[Outcome], None]]:
    """The checks of a tier by name, the fast ones first.

    Args:
        tier: "quick" or "full".
        root: folder of the runs.
    """
    full = tier == "full"
    epochs = 30 if full else 8
    found: dict[str, Callable[[Outcome], None]] = {
        "crash points survived": crash_points,
        "disk-full points survived": disk_errors,
        "checkpoints kept": partial(kept_checkpoints, saves=200 if full else 40),
        "damaged checkpoints detected": damages,
        "bad lines found": partial(bad_lines, root=root, corruptions=2000 if full else 200),
        "ops as in float64": partial(op_errors, backend="torch"),
        "hostile files refused": partial(refusals, root=root),
        "kills survived": partial(kills, root=root, count=100 if full else 10, epochs=epochs),
        "stop signals obeyed": partial(stops, root=root, count=10 if full else 1, epochs=epochs),
        "stops at any time": partial(stops_anywhere, root=root, count=12 if full else 1),
        "stops while importing": partial(stops_while_importing, root=root, count=10 if full else 2),
        "logs without a reader": partial(closed_logs, root=root),
        "failing disks survived": partial(failing_disks, root=root, count=4 if full else 1),
        "second writers refused": partial(second_writers, root=root, count=10 if full else 2),
        "resume points exact": partial(resumes, root=root, every=1 if full else 20),
        "resumed elsewhere": partial(resumes_elsewhere, root=root, count=16 if full else 1),
        "phases that follow exact": partial(phase_changes, root=root),
    }
    if full:
        found["dead ranks noticed"] = partial(rank_deaths, root=root, count=10)
    if torch.cuda.is_available():
        found["kernels as in float64"] = partial(op_errors, backend="triton")
    return found


def run_check(name: str, check: Callable[[Outcome], None]) -> Outcome:
    """Runs a check. An error outside of its cases is a loss, too."""
    outcome, began = Outcome(name), time.monotonic()
    with outcome.case("preparation", tries=0):
        check(outcome)
    outcome.seconds = time.monotonic() - began
    return outcome


def skipped() -> list[str]:
    """What this machine cannot check, with the reason."""
    return [] if torch.cuda.is_available() else [_NO_GPU]
