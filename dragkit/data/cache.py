"""The cache folder, and the atomic creation of a folder in it."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dragkit.errors import ConfigError, WriteError

logger = logging.getLogger(__name__)

# Ends the name of the hidden folder in which a cache folder is built.
_BUILDING = ".building"
_LOCK = ".lock"
# Age of a hidden folder that nobody builds any more. A day leaves time to continue it.
_ABANDONED_S = 86_400.0
# A builder that waits longer says so.
_SILENT_S = 2.0


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Returns `cache_dir` if it is given, else `$DRAGKIT_CACHE`, else `~/.cache/dragkit`.

    Raises:
        ConfigError: the user has no home folder, and nothing else is given.
    """
    if cache_dir is not None:
        return Path(cache_dir)
    if from_environment := os.environ.get("DRAGKIT_CACHE"):
        return Path(os.path.expanduser(from_environment))
    try:
        return Path.home() / ".cache" / "dragkit"
    except RuntimeError as error:
        raise ConfigError(
            "data.cache_dir: there is no home folder for the cache, because HOME is not set. Name "
            "a folder with DRAGKIT_CACHE or --set data.cache_dir=FOLDER."
        ) from error


@contextmanager
def _sole_builder(target: Path) -> Iterator[None]:
    """Holds the lock of the builders of `target`. The operating system frees it if one is killed.

    The file of the lock is removed in the end. A builder that waited then holds the lock of a
    removed file, so it starts again.
    """
    path = target.with_name(f".{target.name}{_LOCK}")
    lock = FileLock(path, timeout=_SILENT_S)
    while True:
        try:
            lock.acquire()
        except Timeout:
            logger.info("waiting for another process that builds %s", target)
            lock.acquire(timeout=-1)
        if path.exists():
            break
        lock.release()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def _remove_abandoned(folder: Path) -> None:
    """Removes what builders that were killed left in a cache folder, once it is a day old."""
    for path in folder.glob(".*"):
        try:
            if time.time() - path.stat().st_mtime < _ABANDONED_S:
                continue
            lock = FileLock(path.with_name(f"{path.stem}{_LOCK}"), timeout=0)
            with lock:
                logger.info("removing %s, which a killed builder left", path)
                shutil.rmtree(path, ignore_errors=True)
                Path(lock.lock_file).unlink(missing_ok=True)
        except OSError as error:
            logger.debug("%s: it is gone, another user's or not abandoned: %s", path, error)


def commit_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Fills a hidden folder with `write` and renames it to `target`. Does nothing if that exists.

    One process at a time builds a target. The others wait for it and then use its folder. A process
    that is killed leaves no target. `write` may keep finished work beside its folder: it survives a
    kill or Ctrl-C, and the next builder of the same target finds it. An error removes all.

    Args:
        target: the folder. Its name is a key of the content.
        write: fills the empty folder that it is given.

    Raises:
        WriteError: the folder cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target.parent)
        with _sole_builder(target):
            if not target.is_dir():
                _build(target, write)
    except OSError as error:
        # Where a file system has no locks between machines, another one may have been faster.
        if target.is_dir():
            logger.info("%s: another process has built it: %s", target, error)
            return
        raise WriteError(
            f"{target}: cannot write the cache: {error.strerror or error}. Free some "
            "space, or name another folder with DRAGKIT_CACHE or --set data.cache_dir=FOLDER."
        ) from error


def _build(target: Path, write: Callable[[Path], None]) -> None:
    building = target.with_name(f".{target.name}{_BUILDING}")
    building.mkdir(exist_ok=True)
    content = Path(tempfile.mkdtemp(prefix="content.", dir=building))
    try:
        write(content)
        for file in content.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        content.rename(target)
        shutil.rmtree(building)
    except Exception:
        shutil.rmtree(building, ignore_errors=True)
        raise
    except BaseException:
        # Ctrl-C. Another call continues from what is finished.
        shutil.rmtree(content, ignore_errors=True)
        with suppress(OSError):
            building.rmdir()
        raise
