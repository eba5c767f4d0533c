"""The cache folder, and the atomic creation of a folder in it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from dragkit.errors import ConfigError, WriteError


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


def commit_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Fills a temporary folder with `write` and renames it to `target`.

    Two processes may do this at once. The first rename wins. The other process drops its copy,
    because the content is a function of the name.

    Raises:
        WriteError: the folder cannot be written. The temporary folder is removed.
    """
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        write(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    except OSError as error:
        raise WriteError(
            f"{target}: cannot write the cache: {error.strerror or error}. Free some "
            "space, or name another folder with DRAGKIT_CACHE or --set data.cache_dir=FOLDER."
        ) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
