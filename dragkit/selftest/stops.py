"""Training that is killed or stopped at any moment ends as if nothing had happened."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from dragkit.selftest.faulty_runs import STOP_SIGNALS, FaultyRuns, handles_stop, toys
from dragkit.selftest.outcome import Outcome, require
from dragkit.selftest.surroundings import closed_log
from dragkit.selftest.toy import STEPS_IN_EPOCH, Processes, Toy, as_on_a_terminal, toy

_FAULTS_IN_A_RUN = 5
_STOPS_IN_A_RUN = 3
_IMPORTS_S = 2.0


def kills(outcome: Outcome, root: Path, *, count: int, epochs: int) -> None:
    """Kills runs of both phases at random moments. Resumed, they end bit for bit the same.

    Args:
        outcome: counts the cases.
        root: folder of the runs.
        count: number of kills. Every fifth hits phase 2, whose steps are slow.
        epochs: length of the runs of phase 1.
    """
    shares = (count - count // 5, count // 5)
    for (run, steps), share in zip(toys(root, epochs), shares, strict=True):
        runs = FaultyRuns(root, run, steps, seed=steps)
        killed = attempt = 0
        while killed < share and attempt < share:
            attempt += 1
            folder = root / f"killed-{run.name}-{attempt}"
            with outcome.case(f"{run.name}, run {attempt}", tries=0):
                for step in runs.moments(min(_FAULTS_IN_A_RUN, share - killed)):
                    hit = runs.kill(folder, step)
                    killed += hit
                    outcome.tried += hit
                runs.end(folder)
            shutil.rmtree(folder, ignore_errors=True)
        outcome.notes.append(
            f"{run.name}: {killed} kills in {attempt} runs of {steps} steps, {runs.in_saves} of "
            "them during a save"
        )


def stops(outcome: Outcome, root: Path, *, count: int, epochs: int) -> None:
    """Stops runs of both phases by signals. They end with 75, and resumed bit for bit the same.

    Args:
        outcome: counts the cases.
        root: folder of the runs.
        count: number of runs of each phase, each with several stops.
        epochs: length of the runs of phase 1.
    """
    for run, steps in toys(root, epochs):
        runs = FaultyRuns(root, run, steps, seed=steps + 1)
        for attempt in range(count):
            folder = root / f"stopped-{run.name}-{attempt}"
            with outcome.case(f"{run.name}, run {attempt}", tries=0):
                for step, number in zip(runs.moments(len(STOP_SIGNALS)), STOP_SIGNALS, strict=True):
                    outcome.tried += runs.stop(folder, step, number)
                outcome.tried += runs.stop_twice(folder, steps - 1)
                runs.end(folder)
            shutil.rmtree(folder, ignore_errors=True)


def second_writers(outcome: Outcome, root: Path, *, count: int) -> None:
    """Starts a second process in the folder of a live run. It is refused, and the run goes on.

    Args:
        outcome: counts the cases.
        root: folder of the runs.
        count: number of second processes. Each killed run is a dead owner of the folder's lock.
    """
    ((run, steps), _) = toys(root, epochs=4)
    runs = FaultyRuns(root, run, steps, seed=steps + 2)
    folder = root / "shared"
    for step in runs.moments(count):
        with outcome.case(f"a second process at about step {step}"):
            process = runs.start_until(folder, step)
            if process.is_alive():
                code = runs.processes.run(run.command(folder, resume=True))
                require(code == 73, f"exit code {code}: {runs.processes.tail()}")
            process.kill()
            runs.slow.wait(process)
    with outcome.case("the run's end"):
        runs.end(folder)


def stops_anywhere(outcome: Outcome, root: Path, *, count: int) -> None:
    """Stops runs at random times between their start and their end: they lose nothing.

    A stop hits loading, packing, an evaluation, training, a save, a validation, or the exit. Each
    run has a new cache, and one of phase 2 trains phase 1 first.

    Args:
        outcome: counts the cases.
        root: folder of the runs.
        count: number of stops of each kind of run.
    """
    # The server of the processes starts now, so that the time of the first run is its own.
    Processes(root).run(["--help"])
    for run, steps, group in _evaluated_toys(root):
        began = time.monotonic()
        # This runs it once without a stop.
        runs = FaultyRuns(root, run, steps, seed=count, group=group)
        seconds = time.monotonic() - began
        stopped = attempt = 0
        while stopped < count and attempt < count:
            attempt += 1
            folder = root / f"anywhere-{run.name}-{attempt}"
            runs.run = run.having(
                str(attempt), data__cache_dir=root / f"cache-{run.name}-{attempt}"
            )
            with outcome.case(f"{run.name}, run {attempt}", tries=0):
                for _ in range(min(_STOPS_IN_A_RUN, count - stopped)):
                    number = runs.draw.choice(STOP_SIGNALS)
                    hit = runs.stop_anywhere(folder, runs.draw.uniform(0, seconds), number)
                    stopped += hit
                    outcome.tried += hit
                runs.end(folder)
            shutil.rmtree(folder, ignore_errors=True)
        outcome.notes.append(f"{run.name}: {stopped} stops at any time in {attempt} runs")


def _evaluated_toys(root: Path) -> list[tuple[Toy, int, bool]]:
    """Runs with evaluations, their number of steps, and whether signals go to all processes."""
    first = toy(root, 1, epochs=2, save_every=4, tests=True)
    both = toy(root, 2, epochs=1, save_every=4, tests=True)
    return [
        (first.having("tests"), 2 * STEPS_IN_EPOCH, False),
        (first.having("2-workers", data__num_workers=2), 2 * STEPS_IN_EPOCH, True),
        (first.having("4-workers", data__num_workers=4), 2 * STEPS_IN_EPOCH, True),
        (both, 2 * STEPS_IN_EPOCH, False),
    ]


def stops_while_importing(outcome: Outcome, root: Path, *, count: int) -> None:
    """Stops the command while Python imports. It ends with 75, and the same command begins.

    Args:
        outcome: counts the cases.
        root: folder of the runs.
        count: number of stops.
    """
    draw, run = random.Random(count), toy(root, 1, epochs=1, save_every=4)
    processes, handled = Processes(root), []
    for attempt in range(count):
        folder, number = root / f"importing-{attempt}", STOP_SIGNALS[attempt % 4]
        with outcome.case(f"{number.name} while importing, {attempt}"):
            command = [sys.executable, "-m", "dragkit.train", *run.command_of_either(folder)]
            began = time.monotonic()
            child = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                preexec_fn=as_on_a_terminal,
            )
            # Before that Python itself starts, and any signal ends it.
            while child.poll() is None and not handles_stop(child.pid):
                time.sleep(0.001)
            handled.append(time.monotonic() - began)
            time.sleep(draw.uniform(0, _IMPORTS_S))
            child.send_signal(number)
            said = child.communicate()[1].decode(errors="replace")
            require(child.returncode == 75, f"exit code {child.returncode}: {said[-200:]}")
            require("Traceback" not in said, said[-200:])
    with outcome.case("the run after all these", tries=0):
        processes.finish(run.command_of_either(folder))
    outcome.notes.append(f"a signal is handled {1000 * max(handled):.0f} ms after Python's start")


def closed_logs(outcome: Outcome, root: Path) -> None:
    """Runs whose standard error, or output too, has no reader. No line of metrics.jsonl is lost.

    Args:
        outcome: counts the cases.
        root: folder of the runs.
    """
    run = toy(root, 1, epochs=2, save_every=4)
    runs = FaultyRuns(root, run, 2 * STEPS_IN_EPOCH, seed=7)
    for descriptors, code in (((2,), 0), ((1, 2), 74)):
        folder = root / f"closed-{len(descriptors)}"
        runs.slow = Processes(root, partial(closed_log, descriptors))
        with outcome.case(f"descriptors {descriptors} closed, stopped"):
            require(runs.stop(folder, 3, signal.SIGHUP), "it was not stopped")
        with outcome.case(f"descriptors {descriptors} closed"):
            found = runs.slow.run(run.command_of_either(folder))
            require(found == code, f"exit code {found}")
            runs.end(folder)
