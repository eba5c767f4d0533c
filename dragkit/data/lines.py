"""Numbered lines of a text file, plain or gzip, with a bound on their length."""

from __future__ import annotations

import difflib
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dragkit.errors import DataError, MissingInputError

BROKEN_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)
_GZIP_MAGIC = b"\x1f\x8b"


def open_source(path: Path) -> BinaryIO:
    """Opens a file as a byte stream and decompresses gzip.

    Raises:
        MissingInputError: the file does not exist (lists similar names) or cannot be read.
        DataError: the name ends in .gz but the content is not gzip.
    """
    try:
        with path.open("rb") as file:
            is_gzip = file.read(2) == _GZIP_MAGIC
        if path.suffix == ".gz" and not is_gzip:
            raise DataError(f"{path}: the name ends in .gz, but the content is not gzip.")
        return gzip.open(path, "rb") if is_gzip else path.open("rb")  # type: ignore[return-value]
    except FileNotFoundError as error:
        folder = path.parent
        hint = f" The folder {folder} does not exist either."
        if folder.is_dir():
            names = sorted(p.name for p in folder.iterdir())
            similar = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4)
            hint = f" Similar names in {folder}: {', '.join(similar)}." if similar else ""
        raise MissingInputError(f"{path}: no such file.{hint}") from error
    except OSError as error:
        raise MissingInputError(f"{path}: cannot be read: {error.strerror or error}.") from error


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
