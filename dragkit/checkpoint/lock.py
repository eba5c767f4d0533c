"""One run folder has one writer: a lock that ends with its process."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from dragkit.checkpoint.atomic import make_dirs
from dragkit.errors import WriteError


class RunInUseError(WriteError):
    """Another live process writes to this run."""

    exit_code = 73


class RunLock:
    """Context manager: while it is entered, no other process can enter it for the same folder.

    The system holds the lock, so it ends with its owner however that dies. The file stays: removing
    it would let two processes lock two files of one name.

    Args:
        root: run folder; made if absent.

    Raises:
        RunInUseError: on entry, if a live process holds the lock; exit code 73.
        WriteError: on entry, if the lock file cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
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
            raise WriteError(
                f"{self.root}: the run cannot be locked ({error}); check the folder's rights and "
                "free space."
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()
