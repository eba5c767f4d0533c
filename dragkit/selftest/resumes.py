"""Runs that are resumed from every step, with other workers, in other processes, across phases."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from dragkit.checkpoint.checkpoint import verify_checkpoint
from dragkit.selftest.faulty_runs import toys
from dragkit.selftest.outcome import Loss, Outcome, require
from dragkit.selftest.surroundings import variables
from dragkit.selftest.toy import Processes, Toy, require_same, toy, trace

_WORKERS = (0, 2, 4)
_HASH_SEEDS = ("0", "1", "4242", "random")
_LOCALES = (
    {"LC_ALL": "C", "PYTHONUTF8": "0"},
    {"LC_ALL": "C.UTF-8", "TZ": "Asia/Kathmandu"},
    {"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8"},
    {"LC_ALL": "POSIX", "OMP_NUM_THREADS": "4"},
)


def _cut(whole: Path, checkpoint: Path, folder: Path) -> Path:
    """A run in `folder` that ended at a checkpoint of the run `whole`, whose log goes on."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copytree(checkpoint, folder / checkpoint.name)
    for name in ("metrics.jsonl", "config.yaml"):
        shutil.copy(whole / name, folder)
    return folder


def _finished(root: Path, run: Toy) -> Path:
    """The folder of an uninterrupted run."""
    whole = root / f"every-step-{run.name}"
    if not whole.exists():
        Processes(root).finish(run.command(whole))
    return whole


def resumes(outcome: Outcome, root: Path, *, every: int) -> None:
    """Resumes a run of 40 steps from its checkpoints, with 1, 2 and 4 micro-batches in a step.

    A stop inside a step ends after its last micro-batch. So every state of a run is tried.

    Args:
        outcome: counts the cases.
        root: folder of the runs.
        every: resume from every n-th checkpoint, and from the last one.
    """
    processes = Processes(root)
    for accumulation in (1, 2, 4):
        run = toy(root, 1, epochs=4, save_every=1, accumulation=accumulation, keep=1000)
        whole = _finished(root, run)
        expected, checkpoints = trace(whole), sorted(whole.glob("step-*"))
        for checkpoint in checkpoints[::-1][::every]:
            with outcome.case(f"{accumulation} micro-batches, {checkpoint.name}"):
                verify_checkpoint(checkpoint)
                cut = _cut(whole, checkpoint, root / f"cut-{run.name}")
                processes.finish(run.command(cut, resume=True))
                require_same(cut, expected)
        outcome.notes.append(f"{accumulation} micro-batches: {len(checkpoints)} checkpoints")


def resumes_elsewhere(outcome: Outcome, root: Path, *, count: int) -> None:
    """Resumes with other loader workers, and in new processes with other surroundings.

    Args:
        outcome: counts the cases.
        root: folder of the runs.
        count: number of surroundings, at most 16.
    """
    run = toy(root, 1, epochs=4, save_every=1, keep=1000)
    whole = _finished(root, run)
    expected, checkpoints = trace(whole), sorted(whole.glob("step-*"))
    middle = checkpoints[len(checkpoints) // 2 - 3]
    for workers in _WORKERS:
        with outcome.case(f"{workers} loader workers"):
            cut = _cut(whole, middle, root / "cut-workers")
            Processes(root).finish(
                [*run.command(cut, resume=True), "--set", f"data.num_workers={workers}"]
            )
            require_same(cut, expected)
    pairs = list(itertools.product(_HASH_SEEDS, _LOCALES))
    # A step of 5 visits every pair of 16 once, and each seed and locale early.
    for seed, places in (pairs[5 * number % len(pairs)] for number in range(count)):
        values = {"PYTHONHASHSEED": seed, **places}
        with outcome.case(" ".join(f"{key}={value}" for key, value in values.items())):
            cut = _cut(whole, middle, root / "cut-surroundings")
            command = [sys.executable, "-m", "dragkit.train", *run.command(cut, resume=True)]
            told = subprocess.run(command, env=os.environ | values, capture_output=True)
            said = told.stderr.decode(errors="replace")
            require(told.returncode == 0, f"exit code {told.returncode}: {said[-200:]}")
            require_same(cut, expected)
    if count == len(pairs):
        _note_threads(outcome, root, run, middle)


def _note_threads(outcome: Outcome, root: Path, run: Toy, middle: Path) -> None:
    """Notes whether two threads give the same bits, which torch does not promise."""
    cut = _cut(middle.parent, middle, root / "cut-threads")
    command = [*run.command(cut, resume=True), "--set", "run.num_threads=2"]
    Processes(root, partial(variables, {"OMP_NUM_THREADS": "2"})).finish(command)
    try:
        require_same(cut, trace(middle.parent))
    except Loss:
        outcome.notes.append("2 threads give other bits than 1: a sum has another order")
    else:
        outcome.notes.append("2 threads give the same bits as 1 in this run")


def phase_changes(outcome: Outcome, root: Path) -> None:
    """Starts phase 2 from a run of phase 1, from its best checkpoint, and from a copy of that.

    Args:
        outcome: counts the cases.
        root: folder of the runs.
    """
    ((_, _), (run, _)) = toys(root, epochs=1)
    start, processes = root / "start", Processes(root)
    best = start / (start / "best").read_text(encoding="ascii").strip()
    copied = root / "copied"
    shutil.copytree(best, copied, dirs_exist_ok=True)
    whole = root / "from-run"
    processes.finish(run.command(whole))
    for name, place in (("its best checkpoint", best), ("a copy of the best", copied)):
        with outcome.case(f"phase 2 from {name}"):
            folder = root / f"from-{place.name}"
            processes.finish([*run.command(folder), "--phase1_checkpoint", str(place)])
            require_same(folder, trace(whole))
    with outcome.case("phase 2 from a run that is none"):
        command = [*run.command(root / "from-none"), "--phase1_checkpoint", str(root / "none")]
        code = processes.run(command)
        require(code == 66, f"exit code {code}: {processes.tail()}")
