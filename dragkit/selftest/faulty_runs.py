"""Toy runs that are killed, stopped and resumed, and compared with an uninterrupted one."""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

from dragkit.selftest.outcome import require
from dragkit.selftest.surroundings import slow_disk
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
_STOP_LIMIT_S = 60.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def logged_step(folder: Path) -> int:
    """The last step in the log of a run."""
    return max((line["step"] for line in logged_steps(folder)), default=0)


def is_saving(folder: Path) -> bool:
    """Whether a run folder has temporary names."""
    return any(".tmp" in path.name or ".old" in path.name for path in folder.iterdir())


class FaultyRuns:
    """Runs of one toy that are hit by signals at random moments.

    Args:
        root: folder of the runs.
        run: the toy.
        steps: optimizer steps of the whole run.
        seed: seed of the moments.
        group: signals go to the group of all processes of a run.
    """

    def __init__(self, root: Path, run: Toy, steps: int, seed: int, *, group: bool = False) -> None:
        self.root, self.run, self.steps = root, run, steps
        self.draw = random.Random(seed)
        self.processes = Processes(root)
        self.slow = Processes(root, partial(slow_disk, _SLOW_FSYNC_S), own_group=group)
        self.in_saves = 0
        whole = root / f"whole-{run.name}-{steps}-steps"
        if not whole.exists():
            self.processes.finish(run.command(whole))
        self.expected = {name: trace(whole / name) for name in _parts(whole)}

    def start_until(self, folder: Path, step: int) -> BaseProcess:
        """Starts or resumes a run. Returns a random time after it has logged `step`, or ended."""
        saved = saved_step(folder)
        process = self.slow.start(self.run.command(folder, resume=saved > 0))
        step = max(step, saved + 1)
        while process.is_alive() and logged_step(folder) < step:
            time.sleep(0.005)
        time.sleep(self.draw.uniform(0, _LONGEST_SAVE_S))
        return process

    def moments(self, count: int) -> list[int]:
        """Random steps of one run, in their order."""
        return sorted(self.draw.sample(range(1, self.steps), count))

    def end(self, folder: Path) -> None:
        """Resumes a run to its end and compares it with an uninterrupted one."""
        self.processes.finish(self.run.command_of_either(folder))
        for name, expected in self.expected.items():
            require_same(folder / name, expected)

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
        self.in_saves += is_saving(folder)
        lost = logged_step(folder) - saved_step(folder)
        require(lost <= self.run.save_every, f"{lost} steps lost by a kill at about step {step}")
        return True

    def stop(self, folder: Path, step: int, number: int) -> bool:
        """Asks a run to stop at about `step`. Returns False where it had ended before.

        Raises:
            Loss: it does not end with 75, or steps are lost.
        """
        process = self.start_until(folder, step)
        self.slow.signal(process, number)
        return self._require_stopped(process, folder, number)

    def stop_anywhere(self, folder: Path, seconds: float, number: int) -> bool:
        """Starts or resumes a run and asks it to stop after `seconds`.

        Returns False where it had ended before.

        Raises:
            Loss: it does not end with 75, or steps are lost.
        """
        process = self.slow.start(self.run.command_of_either(folder))
        while process.is_alive() and not handles_stop(process.pid):
            time.sleep(0.001)
        process.join(seconds)
        self.slow.signal(process, number)
        return self._require_stopped(process, folder, number)

    def _require_stopped(self, process: BaseProcess, folder: Path, number: int) -> bool:
        code = self.slow.wait(process, _STOP_LIMIT_S)
        name = signal.Signals(number).name
        require(code in (0, 75), f"{name}: exit code {code}: {self.slow.tail()}")
        for part in _parts(folder):
            lost = logged_step(folder / part) - saved_step(folder / part)
            require(lost == 0, f"{name}: {lost} steps lost")
            require(not is_saving(folder / part), f"{name}: a temporary folder was left")
        return code == 75

    def stop_twice(self, folder: Path, step: int) -> bool:
        """Sends a second signal during the save. Returns False where the save was over before.

        Raises:
            Loss: the process goes on, or the newest checkpoint is not intact.
        """
        process = self.start_until(folder, step)
        self.slow.signal(process, signal.SIGTERM)
        while process.is_alive() and not is_saving(folder):
            time.sleep(0.001)
        self.slow.signal(process, signal.SIGTERM)
        code = self.slow.wait(process, _STOP_LIMIT_S)
        if code in (0, 75):
            return False
        require(code == -signal.SIGTERM, f"exit code {code}: {self.slow.tail()}")
        lost = logged_step(folder) - saved_step(folder)
        require(lost <= self.run.save_every, f"{lost} steps lost by a second signal")
        return True


def _parts(folder: Path) -> Sequence[str]:
    """The runs in a run folder: itself, and the phase 1 that phase 2 trains first."""
    return [name for name in (".", "phase1") if (folder / name / "metrics.jsonl").exists()]


def handles_stop(pid: int | None) -> bool:
    """Whether a process has a handler of SIGTERM by now."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    mask = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    return mask is not None and bool(int(mask[1], 16) >> (signal.SIGTERM - 1) & 1)


def toys(root: Path, epochs: int) -> list[tuple[Toy, int]]:
    """Phase 1 and phase 2, each with its number of steps."""
    start = root / "start"
    if not start.exists():
        Processes(root).finish(toy(root, 1, epochs=1, save_every=5).command(start))
    return [
        (toy(root, 1, epochs=epochs, save_every=10), epochs * STEPS_IN_EPOCH),
        (toy(root, 2, epochs=2, save_every=4, start=start), 2 * STEPS_IN_EPOCH),
    ]
