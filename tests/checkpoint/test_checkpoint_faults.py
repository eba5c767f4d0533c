"""A save that stops at any of its disk operations leaves the whole old or the whole new checkpoint.

`FaultyDisk` replaces the writer's disk operations and numbers them. At one of them it raises an
error, kills the process, or cuts the power, which loses a part of what was not fsynced.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dragkit.checkpoint import atomic, checkpoint
from dragkit.checkpoint.checkpoint import (
    Snapshot,
    TrainState,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from dragkit.errors import MissingInputError, WriteError

# Operation -> modules in which the writer looks it up.
OPERATIONS = {
    "mkdir": (os,),
    "fsync": (os,),
    "replace": (os,),
    "rmtree": (shutil,),
    "write_durably": (atomic, checkpoint),
}
CLEANING = ("rmtree", "replace")


class Killed(BaseException):
    """Ends the simulated process: it does nothing more."""


def moved(path: Path, source: Path, target: Path) -> Path:
    return target / path.relative_to(source) if path.is_relative_to(source) else path


class FaultyDisk:
    """The operations of a save, numbered from 0, with one fault.

    Args:
        at: number of the operation at which the fault happens; -1 for none.
        fault: "kill" kills the process before the operation. "torn" does half of the operation and
            then kills. "power" kills too, and the test calls `lose_power`. An errno is raised.
        lasting: every later operation that needs disk space raises the errno too.
    """

    def __init__(self, at: int = -1, fault: str | int = "kill", lasting: bool = False) -> None:
        self.real = {name: getattr(modules[0], name) for name, modules in OPERATIONS.items()}
        self.at, self.fault, self.lasting = at, fault, lasting
        self.calls: list[str] = []
        self.dead = self.failed = False
        self.unsynced_files: set[Path] = set()
        self.unsynced_entries: set[Path] = set()
        self.unsynced_renames: list[tuple[Path, Path, bytes | None]] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name, modules in OPERATIONS.items():
            for module in modules:
                patch.setattr(module, name, lambda *args, name=name: self.call(name, *args))

    def call(self, name: str, *args: object) -> object:
        if self.dead:
            raise Killed
        number = len(self.calls)
        self.calls.append(name)
        if isinstance(self.fault, int):
            repeats = self.lasting and self.failed and name in ("mkdir", "write_durably")
            if number == self.at or repeats:
                self.failed = True
                self.half(name, *args)
                raise OSError(self.fault, os.strerror(self.fault))
        elif number == self.at:
            self.dead = True
            if self.fault == "torn":
                self.half(name, *args)
            raise Killed
        return getattr(self, f"do_{name}", self.real[name])(*args)

    def half(self, name: str, *args: object) -> None:
        if name == "write_durably":
            args[0].write_bytes(args[1][: len(args[1]) // 2])
        if name == "rmtree":
            next(path for path in sorted(args[0].rglob("*")) if path.is_file()).unlink()

    def do_mkdir(self, path: Path, *mode: int) -> None:
        self.real["mkdir"](path, *mode)
        self.unsynced_entries.add(Path(path))

    def do_write_durably(self, path: Path, data: bytes) -> str:
        self.unsynced_entries.add(path)
        self.unsynced_files.add(path)
        return self.real["write_durably"](path, data)

    def do_fsync(self, descriptor: int) -> None:
        # No real fsync: the test is about the order of operations.
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.unsynced_files.discard(path)
        if path.is_dir():
            self.unsynced_entries = {p for p in self.unsynced_entries if p.parent != path}
            self.unsynced_renames = [r for r in self.unsynced_renames if r[1].parent != path]

    def do_replace(self, source: Path, target: Path) -> None:
        lost = target.read_bytes() if target.is_file() else None
        self.real["replace"](source, target)
        self.unsynced_files = {moved(p, source, target) for p in self.unsynced_files}
        entries = self.unsynced_entries - {source}
        self.unsynced_entries = {moved(p, source, target) for p in entries}
        self.unsynced_renames.append((source, target, lost))

    def lose_power(self, draw: random.Random) -> None:
        """Undoes a part of what was not fsynced: late renames, new names, ends of files."""
        for path in self.unsynced_files:
            if path.exists():
                os.truncate(path, draw.randint(0, path.stat().st_size))
        for path in self.unsynced_entries:
            if path.exists() and draw.random() < 0.5:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for source, target, lost in reversed(self.unsynced_renames):
            if not target.exists() or draw.random() < 0.5:
                break
            target.rename(source)
            if lost is not None:
                target.write_bytes(lost)


def snapshot_of(value: float) -> Snapshot:
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
    state = TrainState("joint", 0, step, 0, 0, value)
    save_checkpoint(root, step, snapshot_of(value), state, **options)


def value_at(root: Path) -> float | None:
    """The value in all parts of the newest checkpoint; None without a checkpoint."""
    try:
        loaded = load_checkpoint(find_checkpoint(root))
    except MissingInputError:
        return None
    value = loaded.state.best
    assert loaded.json == {"config": {"value": value}}
    assert torch.equal(loaded.tensors["heads"]["w"], torch.full((40,), value))
    assert loaded.tensors["optim"]["w/step"].item() == value
    for name in ("adapter_config.json", "notes.md"):
        assert (loaded.folder / "adapter" / name).read_text() == f"{value}" * 9
    return value


def leftovers(root: Path) -> list[str]:
    return [name for name in os.listdir(root) if ".tmp" in name or ".old" in name]


class Case:
    """A run, and one save into it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.before = folder / "before"
        self.before.mkdir()
        self.step, self.old = 20, 1.0
        if name == "first":
            self.old = None
        else:
            save(self.before, 10, 1.0, is_best=True)
            if name == "replace":
                self.step = 10
        self.root = folder / "run"

    def run(self, disk: FaultyDisk) -> None:
        """Saves the value 2 on `disk`."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.before, self.root)
        with pytest.MonkeyPatch.context() as patch:
            disk.install(patch)
            save(self.root, self.step, 2.0, keep=1, is_best=True)

    def assert_next_save_works(self) -> None:
        """The next save succeeds and removes the leftovers."""
        save(self.root, 30, 3.0)
        assert value_at(self.root) == 3.0
        assert leftovers(self.root) == []


@pytest.fixture(params=["first", "next", "replace"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    # In memory if possible, because the tests make and remove hundreds of folders.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Case(Path(folder), request.param)


def test_a_complete_save_fsyncs_everything(case: Case) -> None:
    disk = FaultyDisk()
    case.run(disk)
    assert len(disk.calls) > 25 and set(OPERATIONS) - set(disk.calls) <= {"rmtree"}
    assert not disk.unsynced_files
    assert not [p for p in disk.unsynced_entries if p.exists()]
    # Also the last rename, which replaces a pointer. A removed folder may come back.
    assert not [target for _, target, _ in disk.unsynced_renames if target.exists()]
    assert value_at(case.root) == 2.0
    assert leftovers(case.root) == []


@pytest.mark.parametrize("fault", ["kill", "torn", "power"])
def test_every_crash_leaves_the_old_or_the_new_checkpoint(case: Case, fault: str) -> None:
    clean = FaultyDisk()
    case.run(clean)
    values = []
    for point in range(len(clean.calls)):
        disk = FaultyDisk(point, fault)
        with pytest.raises(Killed):
            case.run(disk)
        if fault == "power":
            disk.lose_power(random.Random(point))
        else:
            # A folder that is being written or removed never has a checkpoint's name.
            for folder in case.root.glob("step-*"):
                if ".tmp" not in folder.name:
                    verify_checkpoint(folder)
        value = value_at(case.root)
        assert value in (case.old, 2.0), (point, clean.calls[point])
        values.append(value)
        case.assert_next_save_works()
    assert values[0] == case.old and values[-1] == 2.0
    if fault != "power":
        # One operation commits: the old checkpoint before it, the new one after it.
        assert values == sorted(values, key=lambda value: value == 2.0)


@pytest.mark.parametrize(("code", "lasting"), [(errno.ENOSPC, True), (errno.EIO, False)])
def test_every_disk_error_leaves_the_old_or_the_new_checkpoint(
    case: Case, code: int, lasting: bool
) -> None:
    clean = FaultyDisk()
    case.run(clean)
    failures = 0
    for point, name in enumerate(clean.calls):
        message = ""
        try:
            case.run(FaultyDisk(point, code, lasting))
        except WriteError as error:
            message = str(error)
            failures += 1
            assert error.exit_code == 74
        value = value_at(case.root)
        assert value in (case.old, 2.0), (point, name)
        if not message:
            # Only the clean-up after the commit may fail without an error.
            assert value == 2.0 and name in CLEANING, (point, name)
        else:
            assert f"step-{case.step:08d}" in message and os.strerror(code) in message
            assert not [n for n in leftovers(case.root) if ".tmp" in n], (point, name)
            good = case.root / "step-00000010"
            assert value == 2.0 or case.old is None or str(good) in message
        case.assert_next_save_works()
    assert failures > 25


def test_the_file_operations(tmp_path: Path) -> None:
    atomic.make_dirs(tmp_path / "a" / "b")
    path = tmp_path / "a" / "b" / "file"
    assert atomic.write_durably(path, b"abc") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    with pytest.raises(FileExistsError):
        atomic.write_durably(path, b"other")
    (tmp_path / "a" / "b" / "file.tmp").write_text("left by a dead writer")
    atomic.write_text_atomically(path, "new")
    assert path.read_text() == "new" and os.listdir(path.parent) == ["file"]
