"""Training that is killed, stopped or resumed at any step ends as if nothing had happened."""

from __future__ import annotations

import random
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from dragkit.checkpoint.checkpoint import verify_checkpoint
from dragkit.selftest.outcome import Outcome, require
from dragkit.selftest.toy import (
    STEPS_IN_EPOCH,
    Processes,
    Toy,
    logged_steps,
    require_same,
    saved_step,
    toy,
    trace,
)

# A save takes about as long as the steps between two saves, so that faults hit both.
_SLOW_FSYNC_S = 0.005
_LONGEST_SAVE_S = 30 * _SLOW_FSYNC_S
_FAULTS_IN_A_RUN = 5
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_STOP_LIMIT_S = 60.0


def _logged_step(folder: Path) -> int:
    return max((line["step"] for line in logged_steps(folder)), default=0)


def _is_saving(folder: Path) -> bool:
    return any(".tmp" in path.name or ".old" in path.name for path in folder.iterdir())


class _FaultyRuns:
    """Runs of one toy that are hit by signals at random moments.

    Args:
        outcome: counts the cases.
        root: folder of the runs.
        run: the toy.
        steps: optimizer steps of the whole run.
        seed: seed of the moments.
    """

    def __init__(self, root: Path, run: Toy, steps: int, seed: int) -> None:
        self.root, self.run, self.steps = root, run, steps
        self.draw = random.Random(seed)
        self.processes = Processes(root)
        self.slow = Processes(root, fsync_s=_SLOW_FSYNC_S)
        self.in_saves = 0
        whole = root / f"whole-{run.name}-{steps}-steps"
        if not whole.exists():
            self.processes.finish(run.command(whole))
        self.expected = trace(whole)

    def start_until(self, folder: Path, step: int) -> BaseProcess:
        """Starts or resumes a run. Returns a random time after it has logged `step`, or ended."""
        saved = saved_step(folder)
        process = self.slow.start(self.run.command(folder, resume=saved > 0))
        # A signal while Python imports finds no run to save. So this process takes a step first.
        step = max(step, saved + 1)
        while process.is_alive() and _logged_step(folder) < step:
            time.sleep(0.005)
        time.sleep(self.draw.uniform(0, _LONGEST_SAVE_S))
        return process

    def moments(self, count: int) -> list[int]:
        """Random steps of one run, in their order."""
        return sorted(self.draw.sample(range(1, self.steps), count))

    def end(self, folder: Path) -> None:
        """Resumes a run to its end and compares it with an uninterrupted one."""
        self.processes.finish(self.run.command(folder, resume=saved_step(folder) > 0))
        require_same(folder, self.expected)

    def kill(self, folder: Path, step: int) -> bool:
        """Kills a run at about `step`. Returns False where it had ended before.

        Raises:
            Loss: more than one interval between checkpoints is lost.
        """
        process = self.start_until(folder, step)
        process.kill()
        code = self.slow.wait(process)
        if code != -signal.SIGKILL:
            require(code == 0, f"exit code {code}: {self.slow.tail()}")
            return False
        self.in_saves += _is_saving(folder)
        lost = _logged_step(folder) - saved_step(folder)
        require(lost <= self.run.save_every, f"{lost} steps lost by a kill at about step {step}")
        return True

    def stop(self, folder: Path, step: int, number: int) -> bool:
        """Asks a run to stop at about `step`. Returns False where it had ended before.

        Raises:
            Loss: it does not end with 75, or steps are lost.
        """
        process = self.start_until(folder, step)
        alive = process.is_alive()
        self.slow.signal(process, number)
        code = self.slow.wait(process, _STOP_LIMIT_S)
        if code == 0:
            return False
        name = signal.Signals(number).name
        require(not alive or code == 75, f"{name}: exit code {code}: {self.slow.tail()}")
        lost = _logged_step(folder) - saved_step(folder)
        require(lost == 0, f"{name}: {lost} steps lost")
        require(not _is_saving(folder), f"{name}: a temporary folder was left")
        return True

    def stop_twice(self, folder: Path, step: int) -> bool:
        """Sends a second signal during the save. Returns False where the save was over before.

        Raises:
            Loss: the process goes on, or the newest checkpoint is not intact.
        """
        process = self.start_until(folder, step)
        self.slow.signal(process, signal.SIGTERM)
        while process.is_alive() and not _is_saving(folder):
            time.sleep(0.001)
        self.slow.signal(process, signal.SIGTERM)
        code = self.slow.wait(process, _STOP_LIMIT_S)
        if code in (0, 75):
            return False
        require(code == -signal.SIGTERM, f"exit code {code}: {self.slow.tail()}")
        lost = _logged_step(folder) - saved_step(folder)
        require(lost <= self.run.save_every, f"{lost} steps lost by a second signal")
        return True


def _toys(root: Path, epochs: int) -> list[tuple[Toy, int]]:
    """Phase 1 and phase 2, each with its number of steps."""
    start = root / "start"
    if not start.exists():
        Processes(root).finish(toy(root, 1, epochs=1, save_every=5).command(start))
    return [
        (toy(root, 1, epochs=epochs, save_every=10), epochs * STEPS_IN_EPOCH),
        (toy(root, 2, epochs=2, save_every=4, start=start), 2 * STEPS_IN_EPOCH),
    ]


def kills(outcome: Outcome, root: Path, *, count: int, epochs: int) -> None:
    """Kills runs of both phases at random moments. Resumed, they end bit for bit the same.

    Args:
        outcome: counts the cases.
        root: folder of the runs.
        count: number of kills. Every fifth hits phase 2, whose steps are slow.
        epochs: length of the runs of phase 1.
    """
    shares = (count - count // 5, count // 5)
    for (run, steps), share in zip(_toys(root, epochs), shares, strict=True):
        runs = _FaultyRuns(root, run, steps, seed=steps)
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
    for run, steps in _toys(root, epochs):
        runs = _FaultyRuns(root, run, steps, seed=steps + 1)
        for attempt in range(count):
            folder = root / f"stopped-{run.name}-{attempt}"
            with outcome.case(f"{run.name}, run {attempt}", tries=0):
                for step, number in zip(runs.moments(3), _STOP_SIGNALS, strict=True):
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
    ((run, steps), _) = _toys(root, epochs=4)
    runs = _FaultyRuns(root, run, steps, seed=steps + 2)
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


def resumes(outcome: Outcome, root: Path, *, every: int) -> None:
    """Resumes a run of 36 steps from its checkpoints, with 1, 2 and 4 micro-batches in a step.

    Args:
        outcome: counts the cases.
        root: folder of the runs.
        every: resume from every n-th checkpoint.
    """
    processes = Processes(root)
    for accumulation in (1, 2, 4):
        run = toy(root, 1, epochs=3, save_every=1, accumulation=accumulation, keep=1000)
        whole, cut = root / f"every-step-{run.name}", root / f"cut-{run.name}"
        processes.finish(run.command(whole))
        expected = trace(whole)
        checkpoints = sorted(whole.glob("step-*"))
        # The last one has nothing left to train.
        for checkpoint in checkpoints[:-1:every]:
            with outcome.case(f"{accumulation} micro-batches, {checkpoint.name}"):
                verify_checkpoint(checkpoint)
                shutil.rmtree(cut, ignore_errors=True)
                cut.mkdir()
                shutil.copytree(checkpoint, cut / checkpoint.name)
                for name in ("metrics.jsonl", "config.yaml"):
                    shutil.copy(whole / name, cut)
                processes.finish(run.command(cut, resume=True))
                require_same(cut, expected)
        outcome.notes.append(f"{accumulation} micro-batches: {len(checkpoints) - 1} checkpoints")
