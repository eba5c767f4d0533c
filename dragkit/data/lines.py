"""Numbered lines of a text file, plain or gzip, with a bound on their length."""

from __future__ import annotations

import gzip
import stat
import zlib
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dragkit.errors import DataError, MissingInputError, similar_names

BROKEN_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)
_GZIP_MAGIC = b"\x1f\x8b"
# Bytes that are decompressed at once. If gzip data is damaged, the lines before are still read.
_PIECE_BYTES = 1 << 17
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


def numbered_lines(
    stream: BinaryIO, limit: int, first: int = 1
) -> Iterator[tuple[int, bytes | None]]:
    """Yields line numbers from `first` and lines. A line of `limit` bytes or more is None."""
    number = first - 1
    while chunk := stream.readline(limit):
        number += 1
        line: bytes | None = chunk
        # Read over the rest of a long line without ever holding all of it.
        while len(chunk) == limit and not chunk.endswith(b"\n"):
            line, chunk = None, stream.readline(limit)
        yield number, line


class Block(NamedTuple):
    """Consecutive whole lines of a file.

    Attributes:
        number: from 0.
        first_line: number of its first line, from 1.
        data: the lines. One that is too long is cut, but has more than the limit.
        source_bytes: bytes of the file, compressed if it is, that were read for this block.
    """

    number: int
    first_line: int
    data: bytes
    source_bytes: int


class Blocks:
    """Iterates over the blocks of a text file, plain or gzip. They depend on the content alone.

    Args:
        path: the file.
        size: bytes of text in a block. Its last line may exceed them.
        limit: bytes of a line that are kept.

    Attributes:
        num_lines: lines of the blocks so far.
        fault: why the gzip data cannot be read any further, or None.
    """

    def __init__(self, path: Path, size: int, limit: int) -> None:
        self.path, self.size, self.limit = path, size, limit
        self.num_lines = 0
        self.fault: Exception | None = None

    def __iter__(self) -> Iterator[Block]:
        position = 0
        with open_source(self.path) as stream:
            file = getattr(stream, "fileobj", stream)
            for number in count():
                data = b"" if self.fault else self._read(stream)
                if not data:
                    return
                end = file.tell()
                yield Block(number, self.num_lines + 1, data, end - position)
                position = end
                self.num_lines += data.count(b"\n") + (not data.endswith(b"\n"))

    def _read(self, stream: BinaryIO) -> bytes:
        pieces: list[bytes] = []
        missing = self.size
        try:
            while missing > 0 and (piece := stream.read1(min(missing, _PIECE_BYTES))):
                pieces.append(piece)
                missing -= len(piece)
            if not pieces or pieces[-1].endswith(b"\n"):
                return b"".join(pieces)
            pieces.append(stream.readline(self.limit + 1))
            if len(pieces[-1]) > self.limit and not pieces[-1].endswith(b"\n"):
                # Read over the rest of a long line without ever holding all of it.
                while (rest := stream.readline(self.limit)) and not rest.endswith(b"\n"):
                    pass
                pieces.append(b"\n")
            return b"".join(pieces)
        except BROKEN_GZIP as error:
            self.fault = error
            # The last line is incomplete.
            data = b"".join(pieces)
            return data[: data.rfind(b"\n") + 1]
