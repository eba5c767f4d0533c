"""Zstandard files: whether they are whole, and their lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dragkit.data.build.database import connect, quoted_path

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
_ROWS = 10_000


class BrokenZstd(Exception):
    """The data is cut or damaged, or a line is not UTF-8.

    Attributes:
        line: number of the line, None if it is not known.
    """

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


def check_whole(path: Path) -> None:
    """Walks over the blocks of a Zstandard file, because DuckDB takes a cut one for a shorter one.

    Raises:
        BrokenZstd: the file ends within a frame, or something else stands between frames.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        while file.tell() < size:
            _skip_frame(file)
            if file.tell() > size:
                raise BrokenZstd("the Zstandard data is cut")


def _skip_frame(file: BinaryIO) -> None:
    magic = _number(file, 4)
    if magic in _SKIPPABLE:
        file.seek(_number(file, 4), 1)
        return
    if magic != int.from_bytes(ZSTD_MAGIC, "little"):
        raise BrokenZstd("there is something else behind the Zstandard data")
    descriptor = _number(file, 1)
    is_single = bool(descriptor & 0x20)
    dictionary = (0, 1, 2, 4)[descriptor & 3]
    content_size = (int(is_single), 2, 4, 8)[descriptor >> 6]
    file.seek((not is_single) + dictionary + content_size, 1)
    is_last = False
    while not is_last:
        block = _number(file, 3)
        is_last, kind, length = bool(block & 1), block >> 1 & 3, block >> 3
        if kind == 3:
            raise BrokenZstd("the Zstandard data is damaged")
        # A block of one repeated byte holds that byte alone.
        file.seek(1 if kind == 1 else length, 1)
    if descriptor & 4:
        file.seek(4, 1)


def _number(file: BinaryIO, count: int) -> int:
    data = file.read(count)
    if len(data) < count:
        raise BrokenZstd("the Zstandard data is cut")
    return int.from_bytes(data, "little")


def zstd_lines(path: Path, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Yields numbered lines as `numbered_lines` does. A carriage return alone also ends a line.

    Raises:
        BrokenZstd: the data is cut or damaged, or a line is not UTF-8 or too long.
    """
    import duckdb

    check_whole(path)
    # The separator is a character that stands for none, so a line is one column.
    source = (
        f"FROM read_csv({quoted_path(path)}, compression = 'zstd', header = false, "
        f"auto_detect = false, delim = '{chr(0x10FFFF)}', quote = '', escape = '', comment = '', "
        f"columns = {{'line': 'VARCHAR'}}, max_line_size = {limit}, buffer_size = "
    )
    number = 0
    with connect(threads=1) as connection:
        try:
            rows = connection.execute(f"SELECT line {source}{limit})")
            while batch := rows.fetchmany(_ROWS):
                for (line,) in batch:
                    number += 1
                    yield number, (line or "").encode("utf-8") + b"\n"
            # DuckDB loses some lines at the ends of its buffers, which lie elsewhere here.
            again = connection.execute(f"SELECT count(*) {source}{16 * limit + 1})").fetchall()
        except duckdb.Error as error:
            raise _broken(str(error)) from error
    if again != [(number,)]:
        raise BrokenZstd("DuckDB loses lines of this file. Decompress it")


def _broken(message: str) -> BrokenZstd:
    found = re.search(r"on Line: (\d+)", message)
    line = int(found[1]) if found else None
    for sign, reason in (
        ("unicode", "not valid UTF-8"),
        ("Maximum line size", "the line is too long"),
        ("state machine", "some lines end with a carriage return and others do not"),
    ):
        if sign in message:
            return BrokenZstd(f"{reason}. Decompress the file to have all faults listed", line)
    return BrokenZstd(f"the Zstandard data is damaged: {message.splitlines()[0]}", line)
