"""Runs on disks that fail for a while, or for good, and retention where removals fail."""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
from functools import partial
from pathlib import Path

from dragkit.checkpoint.checkpoint import TrainState, mark_best, save_checkpoint
from dragkit.selftest.faulty_disk import FaultyDisk
from dragkit.selftest.outcome import Outcome, require
from dragkit.selftest.saves import leftovers, snapshot_of, value_at
from dragkit.selftest.surroundings import failing_disk, file_limit
from dragkit.selftest.toy import Processes, Toy, require_same, saved_step, toy, trace

_CODES = (errno.ENOSPC, errno.EIO)
_FOREVER = 10**6
_KEEP = 3


def failing_disks(outcome: Outcome, root: Path, *, count: int) -> None:
    """Runs whose saves fail once, twice, or always, and runs with a limit of the file size.

    Args:
        outcome: counts the cases.
        root: folder of the runs.
        count: number of moments at which each failure begins.
    """
    run = toy(root, 1, epochs=4, save_every=4)
    whole = root / "on-a-good-disk"
    Processes(root).finish(run.command(whole))
    expected, draw = trace(whole), random.Random(count)
    for attempt in range(count):
        for code in _CODES:
            for times in (1, 2, _FOREVER):
                # A save writes five files. Without its last two the run would end unsaved.
                at = draw.randrange(1, 35)
                name = f"{errno.errorcode[code]} {'always' if times > 2 else times} from {at}"
                with outcome.case(name):
                    folder = root / f"failing-{attempt}-{code}-{times}"
                    faulty = Processes(root, partial(failing_disk, code, at, times))
                    _require_tolerated(faulty, run, folder, os.strerror(code), times > 2)
                    Processes(root).finish(run.command_of_either(folder))
                    require_same(folder, expected)
                    shutil.rmtree(folder)
    with outcome.case("a limit of the file size"):
        _limited(root, run, expected)
    outcome.notes.append("a third failure in a row ends with 74 and the last good checkpoint")


def _require_tolerated(
    processes: Processes, run: Toy, folder: Path, reason: str, lasts: bool
) -> None:
    """A run goes on after a failure, and ends at the third in a row."""
    before = processes.log.stat().st_size
    code = processes.run(run.command_of_either(folder))
    said = processes.log.read_bytes()[before:].decode(errors="replace")
    require(code == (74 if lasts else 0), f"exit code {code}: {said[-300:]}")
    require(reason in said and "training continues" in said, f"said was {said[-300:]!r}")
    if lasts:
        saved = saved_step(folder)
        last = f"step-{saved:08d}" if saved else "no earlier checkpoint"
        final = said.rstrip().rpartition("\n")[2]
        require(last in final, f"{last} is not named: {final}")


def _limited(root: Path, run: Toy, expected: dict[str, object]) -> None:
    folder, place = root / "limited", root / "limited-log"
    place.mkdir()
    whole = root / "on-a-good-disk"
    largest = max(path.stat().st_size for path in whole.glob("step-*/*.safetensors"))
    limited = Processes(place, partial(file_limit, largest - 1))
    code = limited.run(run.command_of_either(folder))
    require(code == 74, f"exit code {code}: {limited.tail()}")
    require("File too large" in limited.tail(), f"said was {limited.tail()}")
    require(not leftovers(folder), f"left behind: {leftovers(folder)}")
    Processes(root).finish(run.command_of_either(folder))
    require_same(folder, expected)


class _Watched(FaultyDisk):
    """A disk on which removals fail now and then. After every operation a checkpoint is found."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root, self.draw, self.old, self.new = root, random.Random(5), None, 0.0
        self.failed_removals = 0

    def _call(self, name: str, *args: object) -> object:
        if name == "rmtree" and self.draw.random() < 0.3:
            self.failed_removals += 1
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(args[0]))
        result = super()._call(name, *args)
        value = value_at(self.root)
        require(value in (self.old, self.new), f"after {name} the newest checkpoint is {value}")
        return result


def kept_checkpoints(outcome: Outcome, *, saves: int) -> None:
    """Keeps three checkpoints and the best over many saves, while removals fail at random.

    Args:
        outcome: counts the cases.
        saves: number of saves.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "run")
        root.mkdir()
        disk = _Watched(root)
        for number in range(1, saves + 1):
            with outcome.case(f"save {number}"), disk.installed():
                disk.new = float(number)
                state = TrainState("joint", 0, number, 0, 0, float(number))
                save_checkpoint(root, number, snapshot_of(float(number)), state, keep=_KEEP)
                if number % 7 == 0:
                    mark_best(root, number)
                disk.old = disk.new
        with outcome.case("a save on a good disk"):
            state = TrainState("joint", 0, saves + 1, 0, 0, float(saves + 1))
            save_checkpoint(root, saves + 1, snapshot_of(saves + 1.0), state, keep=_KEEP)
            kept = sorted(path.name for path in root.glob("step-*"))
            best = (root / "best").read_text(encoding="ascii").strip()
            require(best in kept and len(kept) <= _KEEP + 1, f"kept are {kept}")
        outcome.notes.append(f"{disk.failed_removals} of the removals failed")
