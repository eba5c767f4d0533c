"""Numbered lines of a text file, plain or gzip, with a bound on their length."""

from __future__ import annotations

import gzip
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dragkit.errors import DataError, MissingInputError, similar_names

BROKEN_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)
_GZIP_MAGIC = b"\x1f\x8b"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(path: Path) -> None:
    """Raises where a file is the pointer that a checkout without Git LFS leaves in its place.

    Raises:
        MissingInputError: it is a pointer.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise MissingInputError(
                f"{path}: a Git LFS pointer, not the file itself. Fetch the file with: git lfs pull"
            )


def open_source(path: Path) -> BinaryIO:
    """Opens a file as a byte stream and decompresses gzip.

    Raises:
        MissingInputError: the file does not exist (lists similar names), is a folder, a pipe or a
            Git LFS pointer, or cannot be read.
        DataError: the name ends in .gz but the content is not gzip.
    """
    try:
        _require_regular(path)
        refuse_lfs_pointer(path)
        with path.open("rb") as file:
            is_gzip = file.read(2) == _GZIP_MAGIC
        if path.suffix == ".gz" and not is_gzip:
            raise DataError(f"{path}: the name ends in .gz, but the content is not gzip.")
        return gzip.open(path, "rb") if is_gzip else path.open("rb")  # type: ignore[return-value]
    except FileNotFoundError as error:
        if path.is_symlink():
            hint = f" It is a link to {path.readlink()}, which does not exist."
        else:
            hint = similar_names(path)
        raise MissingInputError(f"{path}: no such file.{hint}") from error
    except OSError as error:
        raise MissingInputError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _require_regular(path: Path) -> None:
    """Raises where the path is a folder or a pipe. A file is read more than once."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        names = sorted(p.name for p in path.iterdir() if ".json" in p.name)
        hint = f" Name one of its files: {', '.join(names[:5])}." if names else ""
        raise MissingInputError(f"{path}: a folder, not a file.{hint}")
    if not stat.S_ISREG(mode):
        raise MissingInputError(
            f"{path}: a pipe or a device, not a file. It is read more than once, so save its "
            "content in a file and name that."
        )


def numbered_lines(stream: BinaryIO, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Yields line numbers and lines. A line of `limit` bytes or more is None."""
    number = 0
    while chunk := stream.readline(limit):
        number += 1
        line: bytes | None = chunk
        # Read over the rest of a long line without ever holding all of it.
        while len(chunk) == limit and not chunk.endswith(b"\n"):
            line, chunk = None, stream.readline(limit)
        yield number, line
