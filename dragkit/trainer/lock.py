"""One run folder, one writer: a lock file that names its owner and that dies with it."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from dragkit.errors import WriteError
from dragkit.trainer import atomic

logger = logging.getLogger(__name__)

LOCK_NAME = "run.lock"
_MAX_LOCK_BYTES = 4096

# Lock files that this process holds, by resolved folder.
_held: dict[Path, int] = {}


def _close_in_child() -> None:
    """A forked worker that outlives its killed parent must not keep the run locked."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


class RunInUseError(WriteError):
    """Another live process writes to this run."""

    exit_code = 73


class LockOwner(NamedTuple):
    """Who wrote a lock file."""

    pid: int
    host: str


def read_lock_owner(root: Path) -> LockOwner | None:
    """The process that a run's lock file names; None if the run is free or the file illegible."""
    try:
        with open(root / LOCK_NAME, "rb") as file:
            content = json.loads(file.read(_MAX_LOCK_BYTES))
        return LockOwner(int(content["pid"]), str(content["host"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def is_locked_here(root: Path) -> bool:
    """Whether this process holds the lock of `root` or of a folder above it."""
    root = root.resolve()
    return any(folder in _held for folder in (root, *root.parents))


def is_locked_elsewhere(root: Path) -> bool:
    """Whether the lock file of `root`, or of the folder above it, names another machine."""
    owner = read_lock_owner(root) or read_lock_owner(root.parent)
    return owner is not None and owner.host != socket.gethostname()


class RunLock:
    """Context manager: while inside, no other process can enter for the same folder.

    The lock is the kernel's (`flock` on `<root>/run.lock`), so it ends with its owner however that
    dies, and a reused process number cannot keep it. The file's text, pid and host, is for
    messages, and decides only where the file system has no locks. The empty file stays behind:
    removing it would let two processes hold two files of one name.

    Args:
        root: run folder; made if absent.

    Raises:
        RunInUseError: on entry, if a live process holds the lock; exit code 73.
        WriteError: on entry, if the lock file cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.path = self.root / LOCK_NAME

    def __enter__(self) -> RunLock:
        descriptor = -1
        try:
            atomic.make_folders(self.root)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self.path, flags, 0o644)
            self._acquire(descriptor)
            text = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text.encode(), 0)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise WriteError(
                f"{self.path}: the run cannot be locked ({error.strerror or error}); "
                "check the folder's rights and free space"
            ) from error
        except RunInUseError:
            os.close(descriptor)
            raise
        _held[self.root.resolve()] = descriptor
        return self

    def _acquire(self, descriptor: int) -> None:
        """Take the lock or raise; a lock left by a dead owner is taken over."""
        owner = read_lock_owner(self.root)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            in_use = False
        except BlockingIOError:
            in_use = True
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
            # A process on another machine cannot be seen from here, so it counts as alive.
            here = owner is not None and owner.host == socket.gethostname()
            in_use = owner is not None and (not here or atomic.process_is_alive(owner.pid))
        if in_use:
            who = f"process {owner.pid} on {owner.host}" if owner else "another process"
            raise RunInUseError(
                f"{self.root}: {who} is writing to this run ({self.path}); wait for it, stop it, "
                "or choose another folder"
            )
        if owner is not None:
            logger.warning(
                "%s: taken over from process %d on %s, which is gone",
                self.path,
                owner.pid,
                owner.host,
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        descriptor = _held.pop(self.root.resolve(), None)
        # A forked child that leaves the block holds nothing and must not free its parent's lock.
        if descriptor is not None:
            try:
                os.ftruncate(descriptor, 0)
            finally:
                os.close(descriptor)
