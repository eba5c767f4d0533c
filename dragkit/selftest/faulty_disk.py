"""A disk on which one operation of a save fails.

`FaultyDisk` replaces the writer's disk operations and numbers them. At one of them it raises an
error, kills the process, or cuts the power, which loses a part of what was not fsynced.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

from dragkit.checkpoint import atomic, checkpoint

# Operation -> modules in which the writer looks it up.
OPERATIONS: dict[str, tuple[ModuleType, ...]] = {
    "mkdir": (os,),
    "fsync": (os,),
    "replace": (os,),
    "rmtree": (shutil,),
    "write_durably": (atomic, checkpoint),
}
# Operations of the clean-up after a commit, which may fail without an error.
CLEANING = ("rmtree", "replace")


class Killed(BaseException):
    """Ends the simulated process: it does nothing more."""


def _moved(path: Path, source: Path, target: Path) -> Path:
    return target / path.relative_to(source) if path.is_relative_to(source) else path


class FaultyDisk:
    """The operations of a save, numbered from 0, with one fault.

    Args:
        at: number of the operation at which the fault happens; -1 for none.
        fault: "kill" kills the process before the operation, "after" behind it. "torn" does half
            of the operation and then kills. "power" kills too, and the caller then calls
            `lose_power`. An errno is raised.
        lasting: every later operation that needs disk space raises the errno too.

    Attributes:
        calls: names of the operations so far.
        unsynced_files, unsynced_entries, unsynced_renames: what a power cut may undo.
    """

    def __init__(self, at: int = -1, fault: str | int = "kill", lasting: bool = False) -> None:
        self.real = {name: getattr(modules[0], name) for name, modules in OPERATIONS.items()}
        self.at, self.fault, self.lasting = at, fault, lasting
        self.calls: list[str] = []
        self.dead = self.failed = False
        self.unsynced_files: set[Path] = set()
        self.unsynced_entries: set[Path] = set()
        self.unsynced_renames: list[tuple[Path, Path, bytes | None]] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replaces the operations inside the block."""
        with ExitStack() as stack:
            for name, modules in OPERATIONS.items():
                for module in modules:
                    patch = mock.patch.object(module, name, self._replacement(name))
                    stack.enter_context(patch)
            yield

    def _replacement(self, name: str) -> object:
        return lambda *args: self._call(name, *args)

    def _call(self, name: str, *args: object) -> object:
        if self.dead:
            raise Killed
        number = len(self.calls)
        self.calls.append(name)
        operation = getattr(self, f"_{name}", self.real[name])
        if isinstance(self.fault, int):
            repeats = self.lasting and self.failed and name in ("mkdir", "write_durably")
            if number == self.at or repeats:
                self.failed = True
                self._half(name, *args)
                raise OSError(self.fault, os.strerror(self.fault))
        elif number == self.at:
            self.dead = True
            if self.fault == "torn":
                self._half(name, *args)
            if self.fault == "after":
                operation(*args)
            raise Killed
        return operation(*args)

    def _half(self, name: str, *args: object) -> None:
        if name == "write_durably":
            args[0].write_bytes(args[1][: len(args[1]) // 2])  # type: ignore[attr-defined, index, arg-type]
        if name == "rmtree":
            files = (path for path in sorted(args[0].rglob("*")) if path.is_file())  # type: ignore[attr-defined]
            next(files).unlink()

    def _mkdir(self, path: Path, *mode: int) -> None:
        self.real["mkdir"](path, *mode)
        self.unsynced_entries.add(Path(path))

    def _write_durably(self, path: Path, data: bytes) -> str:
        self.unsynced_entries.add(path)
        self.unsynced_files.add(path)
        return self.real["write_durably"](path, data)

    def _fsync(self, descriptor: int) -> None:
        # No real fsync: only the order of the operations matters.
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.unsynced_files.discard(path)
        if path.is_dir():
            self.unsynced_entries = {p for p in self.unsynced_entries if p.parent != path}
            self.unsynced_renames = [r for r in self.unsynced_renames if r[1].parent != path]

    def _replace(self, source: Path, target: Path) -> None:
        lost = target.read_bytes() if target.is_file() else None
        self.real["replace"](source, target)
        self.unsynced_files = {_moved(p, source, target) for p in self.unsynced_files}
        entries = self.unsynced_entries - {source}
        self.unsynced_entries = {_moved(p, source, target) for p in entries}
        self.unsynced_renames.append((source, target, lost))

    def unsynced(self) -> list[Path]:
        """Files, names and renames that a power cut could still undo, of paths that exist."""
        renamed = {target for _, target, _ in self.unsynced_renames}
        paths = self.unsynced_files | self.unsynced_entries | renamed
        return sorted(path for path in paths if path.exists())

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
