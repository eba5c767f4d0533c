"""The checks of each tier."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from dragkit.data.question_file import MAX_LINE_BYTES
from dragkit.selftest.bad_lines import bad_lines
from dragkit.selftest.bombs import bombs
from dragkit.selftest.damages import damages
from dragkit.selftest.data_cases import (
    builders,
    cache_keys,
    compressed_files,
    large_files,
    names_kept,
    shortest_labels,
)
from dragkit.selftest.failing_disks import failing_disks, kept_checkpoints
from dragkit.selftest.metric_table import metric_table
from dragkit.selftest.numbers.batches import accumulation, batch_invariance, prompt_limits
from dragkit.selftest.numbers.content import large_graph, odd_content, order_of_facts
from dragkit.selftest.numbers.draws import draw_gradients, empty_draws
from dragkit.selftest.numbers.updates import adapters_learn, anomalies, frozen_weights
from dragkit.selftest.ops import op_errors
from dragkit.selftest.outcome import Outcome
from dragkit.selftest.privacy import offline, secrets
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
        "bad lines found": partial(
            bad_lines,
            root=root,
            corruptions=2000 if full else 200,
            long_line=MAX_LINE_BYTES if full else 0,
        ),
        "names kept byte for byte": partial(names_kept, root=root),
        "damaged compressed files refused": partial(compressed_files, root=root),
        "labels by identity": partial(shortest_labels, root=root, count=1000 if full else 200),
        "caches keyed by content": partial(cache_keys, root=root, count=100 if full else 20),
        "killed builders of caches": partial(builders, root=root, count=20 if full else 3),
        "large files packed": partial(
            large_files,
            root=root,
            num_facts=10**6 if full else 10**5,
            num_questions=10**5 if full else 10**3,
        ),
        "scores computed by hand": metric_table,
        "ops as in float64": partial(op_errors, backend="torch"),
        "bombs refused": partial(bombs, root=root, digits=100_000_000 if full else 10_000_000),
        "large graphs sorted": partial(large_graph, num_facts=10**6),
        "odd questions used and counted": partial(odd_content, root=root),
        "equal in any order of facts": partial(order_of_facts, root=root, count=16),
        "equal in any micro-batches": partial(accumulation, root=root),
        "equal in any batch": partial(batch_invariance, root=root, batches=10 if full else 1),
        "full prompts and missing answers": partial(prompt_limits, root=root),
        "gradients of draws exact": partial(draw_gradients, count=1000),
        "draws of unlikely facts": partial(empty_draws, root=root),
        "NaN and infinity refused": partial(anomalies, root=root, steps=5 if full else 1),
        "adapters that learn": partial(adapters_learn, root=root),
        "frozen weights unchanged": partial(frozen_weights, root=root, steps=100 if full else 10),
        "hostile files refused": partial(refusals, root=root),
        "secrets kept": partial(secrets, root=root),
        "network unused": partial(offline, root=root),
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
