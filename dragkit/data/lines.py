"""Lines of a text file that may be gzip and may hold lines of any length."""

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
    """The file as a byte stream, unpacked where it is gzip.

    Raises:
        MissingInputError: no such file, or it cannot be read; names the nearest ones beside it.
        DataError: named .gz without being gzip.
    """
    try:
        with path.open("rb") as file:
            packed = file.read(2) == _GZIP_MAGIC
        if path.suffix == ".gz" and not packed:
            raise DataError(f"{path}: is named .gz but does not start like a gzip file.")
        return gzip.open(path, "rb") if packed else path.open("rb")  # type: ignore[return-value]
    except FileNotFoundError as error:
        folder = path.parent
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, there, n=3, cutoff=0.4)
        hint = (
            f" Near it in {folder}: {', '.join(near)}."
            if near
            else ("" if folder.is_dir() else f" The folder {folder} does not exist either.")
        )
        raise MissingInputError(f"{path}: no such file.{hint}") from error
    except OSError as error:
        raise MissingInputError(f"{path}: cannot be read: {error.strerror or error}.") from error


def numbered_lines(stream: BinaryIO, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines. A line of `limit` bytes or more is given as None and never held whole."""
    number = 0
    while piece := stream.readline(limit):
        number += 1
        line: bytes | None = piece
        while len(piece) == limit and not piece.endswith(b"\n"):
            line, piece = None, stream.readline(limit)
        yield number, line
