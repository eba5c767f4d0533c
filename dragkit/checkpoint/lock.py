"""The lock of a run folder, which admits one writer."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from dragkit.checkpoint.atomic import make_dirs
from dragkit.errors import CreateError


class RunInUseError(CreateError):
    """Another live process writes to this run."""


class RunLock:
    """Context manager that only one process can hold for a folder.

    The operating system releases the lock when the process ends. The lock file stays: if it were
    removed, two processes could lock two files of the same name.

    Args:
        root: run folder, made if absent.

    Raises:
        RunInUseError: on entry, another live process holds the lock (exit code 73).
        CreateError: on entry, the folder or the lock file cannot be created.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        # Do not wait for the lock: the other process may train for days.
        self._lock = FileLock(self.root / "run.lock", timeout=0)

    def __enter__(self) -> RunLock:
        try:
            make_dirs(self.root)
            self._lock.acquire()
        except Timeout as error:
            raise RunInUseError(
                f"{self.root}: another process is writing to this run (it holds run.lock). Wait "
                "for it, stop it, or choose another folder."
            ) from error
        except OSError as error:
            raise CreateError(
                f"{self.root}: the run cannot be locked ({error}). Name another folder, or check "
                "this one's permissions and the free space."
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()
