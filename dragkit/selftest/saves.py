"""Saves that a crash, a power cut or a full disk stops at each of their operations."""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dragkit.checkpoint.checkpoint import (
    Snapshot,
    TrainState,
    find_checkpoint,
    load_checkpoint,
    mark_best,
    save_checkpoint,
    verify_checkpoint,
)
from dragkit.errors import MissingInputError, WriteError
from dragkit.selftest.faulty_disk import CLEANING, FaultyDisk, Killed
from dragkit.selftest.outcome import Outcome, require

# The save makes the run's first checkpoint, a further one, or replaces one of the same step.
SITUATIONS = ("first", "next", "replace")
CRASHES = ("kill", "after", "torn", "power")
# Error number, and whether later writes fail too: the disk stays full, or fails once.
DISK_ERRORS = ((errno.ENOSPC, True), (errno.EIO, False))


def snapshot_of(value: float) -> Snapshot:
    """A checkpoint whose every part follows from `value`."""

    def adapter(folder: Path) -> None:
        # Like PEFT, it neither fsyncs nor cleans up.
        for name in ("adapter_config.json", "notes.md"):
            (folder / name).write_text(f"{value}" * 9)

    return Snapshot(
        {"heads": {"w": torch.full((40,), value)}, "optim": {"w/step": torch.tensor(value)}},
        {"adapter": adapter},
        {"config": {"value": value}},
    )


def save(root: Path, step: int, value: float, **options: object) -> None:
    """Saves `snapshot_of(value)` at `step`, and marks it as the best, as training does."""
    state = TrainState("joint", 0, step, 0, 0, value)
    save_checkpoint(root, step, snapshot_of(value), state, **options)  # type: ignore[arg-type]
    mark_best(root, step)


def value_at(root: Path) -> float | None:
    """The value in all parts of the newest checkpoint. It is None without a checkpoint.

    Raises:
        Loss: the parts hold different values.
        CheckpointError: no checkpoint is intact.
    """
    try:
        loaded = load_checkpoint(find_checkpoint(root))
    except MissingInputError:
        return None
    value = loaded.state.best
    require(value is not None and loaded.json == {"config": {"value": value}}, "other config")
    heads = loaded.tensors["heads"]["w"]
    require(torch.equal(heads, torch.full((40,), value)), "other tensors")
    require(loaded.tensors["optim"]["w/step"].item() == value, "other optimizer state")
    for name in ("adapter_config.json", "notes.md"):
        text = (loaded.folder / "adapter" / name).read_text()
        require(text == f"{value}" * 9, f"other content of adapter/{name}")
    return value


def leftovers(root: Path) -> list[str]:
    """Temporary names in a run folder."""
    return [name for name in os.listdir(root) if ".tmp" in name or ".old" in name]


class SaveCase:
    """A run, and one save of the value 2 into it.

    Attributes:
        old: value of the newest checkpoint before the save, None without one.
        root: the run folder, new for each call of `run`.
    """

    def __init__(self, folder: Path, situation: str) -> None:
        self.before = folder / "before"
        self.before.mkdir()
        self.step = 20
        self.old: float | None = 1.0
        if situation == "first":
            self.old = None
        else:
            save(self.before, 10, 1.0)
            if situation == "replace":
                self.step = 10
        self.root = folder / "run"

    def run(self, disk: FaultyDisk) -> None:
        """Saves the value 2 on `disk`."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.before, self.root)
        with disk.installed():
            save(self.root, self.step, 2.0, keep=1)

    def operations(self) -> list[str]:
        """The operations of the save without a fault.

        Raises:
            Loss: the save leaves something that a power cut would undo.
        """
        disk = FaultyDisk()
        self.run(disk)
        require(not disk.unsynced(), f"not fsynced: {disk.unsynced()}")
        require(value_at(self.root) == 2.0, "a complete save is not the newest checkpoint")
        require(not leftovers(self.root), f"a complete save leaves {leftovers(self.root)}")
        return disk.calls

    def crash(self, point: int, fault: str) -> float | None:
        """Crashes at an operation. Returns the value found then, and saves once more.

        Raises:
            Loss: neither the whole old nor the whole new checkpoint is found, or the next save
                leaves temporary names.
        """
        disk = FaultyDisk(point, fault)
        try:
            self.run(disk)
        except Killed:
            pass
        else:
            require(False, "the fault did not happen")
        if fault == "power":
            disk.lose_power(random.Random(point))
        else:
            # A folder that is being written or removed never has a checkpoint's name.
            for folder in self.root.glob("step-*"):
                if ".tmp" not in folder.name:
                    verify_checkpoint(folder)
        value = value_at(self.root)
        require(value in (self.old, 2.0), f"the newest checkpoint holds {value}")
        self._save_once_more()
        return value

    def fail(self, point: int, code: int, lasting: bool) -> bool:
        """Lets an operation raise an error. Returns whether the save reported it.

        Raises:
            Loss: a checkpoint was lost, an error was not reported, or the report names no remedy.
        """
        disk = FaultyDisk(point, code, lasting)
        message = ""
        try:
            self.run(disk)
        except WriteError as error:
            require(error.exit_code == 74, f"exit code {error.exit_code}")
            message = str(error)
        value = value_at(self.root)
        require(value in (self.old, 2.0), f"the newest checkpoint holds {value}")
        if not message:
            # Only the clean-up after the commit may fail without an error.
            name = disk.calls[point]
            require(value == 2.0 and name in CLEANING, f"a failed {name} was not reported")
        else:
            wanted = [f"step-{self.step:08d}", os.strerror(code)]
            if value != 2.0 and self.old is not None:
                wanted.append(str(self.root / "step-00000010"))
            require(all(part in message for part in wanted), f"the message is {message!r}")
            temporary = [name for name in leftovers(self.root) if ".tmp" in name]
            require(not temporary, f"left behind: {temporary}")
        self._save_once_more()
        return bool(message)

    def _save_once_more(self) -> None:
        save(self.root, 30, 3.0)
        require(value_at(self.root) == 3.0, "the next save is not found")
        require(not leftovers(self.root), f"the next save leaves {leftovers(self.root)}")


@contextmanager
def save_case(situation: str) -> Iterator[SaveCase]:
    """A case in a temporary folder, in memory if possible, because it makes hundreds of folders."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield SaveCase(Path(folder), situation)


def crash_points(outcome: Outcome) -> None:
    """Every operation of a save x kill before, kill after, torn write, power cut."""
    for situation in SITUATIONS:
        with save_case(situation) as case:
            operations = case.operations()
            outcome.notes.append(f"{situation} save: {len(operations)} operations")
            for fault in CRASHES:
                for point, name in enumerate(operations):
                    with outcome.case(f"{situation} save, {fault} at {point} ({name})"):
                        case.crash(point, fault)


def disk_errors(outcome: Outcome) -> None:
    """Every operation of a save x a disk that stays full, or fails once."""
    reported = 0
    for situation in SITUATIONS:
        with save_case(situation) as case:
            operations = case.operations()
            for code, lasting in DISK_ERRORS:
                for point, name in enumerate(operations):
                    with outcome.case(f"{situation} save, {os.strerror(code)} at {point} ({name})"):
                        reported += case.fail(point, code, lasting)
    outcome.notes.append(f"{reported} errors reported, the others in the clean-up after the commit")
