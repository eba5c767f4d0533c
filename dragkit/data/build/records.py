"""Rows of JSON lines, tables, parquet and Arrow files and hub data sets, by column name."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dragkit.data.build.source_question import SourceProblem
from dragkit.data.lines import BROKEN_GZIP, numbered_lines, open_source
from dragkit.data.question_file import MAX_LINE_BYTES
from dragkit.data.question_row import Fault, decode_fields
from dragkit.errors import MissingInputError

_BOM = b"\xef\xbb\xbf"
_ARROW_STREAM = b"\xff\xff\xff\xff"
# A question with its graph takes some megabytes as Python objects.
_ROWS_AT_ONCE = 16
# The engine reads up to 2,048 rows at once: 1.8 GB where each has 2,000 facts.
_PARQUET_MEMORY = "4GB"


class Record(NamedTuple):
    """A row: its number from 1, and its values by column. A JSON value may be `msgspec.Raw`."""

    line: int
    fields: Mapping[str, Any]


Rows = Iterator[Record | SourceProblem]


def text_lines(path: Path) -> Iterator[tuple[int, bytes] | SourceProblem]:
    """Yields the numbers and bytes of the lines that are not blank, without their line ends."""
    number = 0
    with open_source(path) as stream:
        try:
            for number, line in numbered_lines(stream, MAX_LINE_BYTES):
                if line is None:
                    size = f"{MAX_LINE_BYTES / 1e6:g} MB"
                    yield SourceProblem(path, number, "$", f"the line is too long: {size} or more")
                    continue
                line = line.removeprefix(_BOM) if number == 1 else line
                if line.strip():
                    yield number, line.rstrip(b"\r\n")
        except BROKEN_GZIP as error:
            reason = f"the gzip data is truncated or damaged: {error}"
            yield SourceProblem(path, number + 1, "$", reason)


def text_cells(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]] | SourceProblem]:
    """Yields the numbers and the cells of the lines of a text file. Nothing is quoted."""
    for item in text_lines(path):
        if isinstance(item, SourceProblem):
            yield item
            continue
        number, line = item
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            reason = f"not UTF-8: {error.reason} (byte {error.start})"
            yield SourceProblem(path, number, "$", reason)
            continue
        if "\0" in text:
            yield SourceProblem(path, number, "$", "a NUL character")
        else:
            yield number, text.split(delimiter)


def json_rows(path: Path) -> Rows:
    """Yields the objects of a file of JSON lines, plain or gzip."""
    for item in text_lines(path):
        if isinstance(item, SourceProblem):
            yield item
            continue
        yield _record(path, *item)


def _record(path: Path, number: int, line: bytes) -> Record | SourceProblem:
    fields = decode_fields(line)
    if isinstance(fields, Fault):
        return SourceProblem(path, number, *fields)
    return Record(number, fields)


def table_rows(path: Path, delimiter: str, *, has_header: bool) -> Rows:
    """Yields the rows of a table. Without a header the columns are called "1", "2" and so on.

    Commas separate cells that may be quoted. Tabs separate cells that may not.
    """
    names: list[str] | None = None
    for item in _cells(path, delimiter):
        if isinstance(item, SourceProblem):
            yield item
            continue
        number, row = item
        if names is None:
            names = row if has_header else [str(i + 1) for i in range(len(row))]
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                yield SourceProblem(path, number, "$", f"columns of one name: {repeated[0]!r}")
                return
            if has_header:
                continue
        if len(row) != len(names):
            where = "the header" if has_header else "the first line"
            reason = f"{len(row)} columns, where {where} has {len(names)}"
            yield SourceProblem(path, number, "$", reason)
        else:
            yield Record(number, dict(zip(names, row, strict=True)))


def _cells(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]] | SourceProblem]:
    return _csv_cells(path) if delimiter == "," else text_cells(path, delimiter)


def _csv_cells(path: Path) -> Iterator[tuple[int, list[str]] | SourceProblem]:
    """Yields the line numbers at which rows begin, and their cells."""
    # The limit is one of the process. Names are longer than the module's 128 kB.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    with open_source(path) as stream:
        # A row may span lines, so wrong bytes are found in its cells.
        lines = _decoded(stream)
        reader = csv.reader(lines, strict=True)
        while True:
            number = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield SourceProblem(path, number, "$", f"not valid CSV: {error}")
                continue
            except BROKEN_GZIP as error:
                reason = f"the gzip data is truncated or damaged: {error}"
                yield SourceProblem(path, number, "$", reason)
                return
            if row is None:
                return
            text = "".join(row)
            if not text.strip() and len(row) < 2:
                continue
            if any("\ud800" <= c <= "\udfff" for c in text):
                yield SourceProblem(path, number, "$", "not UTF-8")
            elif "\0" in text:
                yield SourceProblem(path, number, "$", "a NUL character")
            else:
                yield number, row


def _decoded(stream: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(stream):
        line = line.removeprefix(_BOM) if number == 0 else line
        yield line.decode("utf-8", "surrogateescape")


def parquet_rows(path: Path) -> Rows:
    """Yields the rows of a parquet file."""
    import duckdb

    number = 0
    with duckdb.connect(config={"threads": 1, "memory_limit": _PARQUET_MEMORY}) as connection:
        try:
            # JSON text is decoded several times faster than the engine makes Python lists.
            query = "SELECT CAST(to_json(r) AS VARCHAR) FROM read_parquet(?) r"
            result = connection.execute(query, [_unglobbed(path)])
            while (row := result.fetchone()) is not None:
                number += 1
                yield _record(path, number, row[0].encode())
        except duckdb.Error as error:
            reason = f"cannot be read as parquet: {str(error).splitlines()[0]}"
            yield SourceProblem(path, number + 1, "$", reason)


def _parquet_columns(path: Path) -> tuple[str, ...]:
    import duckdb

    try:
        with duckdb.connect() as connection:
            query = "DESCRIBE SELECT * FROM read_parquet(?)"
            return tuple(row[0] for row in connection.execute(query, [_unglobbed(path)]).fetchall())
    except duckdb.Error:
        # Reading the rows reports it.
        return ()


def _unglobbed(path: Path) -> str:
    """Returns the path as a pattern that matches it alone."""
    return re.sub(r"([*?\[])", r"[\1]", str(path))


def arrow_rows(path: Path) -> Rows:
    """Yields the rows of an Arrow IPC file, of the file or the stream format."""
    pyarrow = _hub_module("pyarrow", path)
    ipc = _hub_module("pyarrow.ipc", path)
    number = 0
    try:
        with pyarrow.memory_map(str(path)) as source:
            if starts(path).startswith(b"ARROW1"):
                file = ipc.open_file(source)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
            else:
                batches = iter(ipc.open_stream(source))
            for batch in batches:
                for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                    rows = batch.slice(start, _ROWS_AT_ONCE).to_pylist()
                    for row in rows:
                        number += 1
                        yield Record(number, row)
    except (pyarrow.ArrowException, OSError) as error:
        reason = f"the Arrow data is truncated or damaged: {error}"
        yield SourceProblem(path, number + 1, "$", reason)


def hub_splits(name: str) -> dict[str, Callable[[], Rows]]:
    """Returns the rows of each split of a data set of the hub, streamed.

    Args:
        name: owner and name, or a local folder; `@REVISION` may follow.
    """
    datasets = _hub_module("datasets", Path(f"hf:{name}"))
    repository, _, revision = name.partition("@")
    try:
        splits = datasets.load_dataset(repository, revision=revision or None, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise MissingInputError(f"hf:{name}: cannot be read: {error}") from error

    def rows(split: Any) -> Rows:
        return (Record(number, row) for number, row in enumerate(split, 1))

    return {str(split): partial(rows, data) for split, data in splits.items()}


def _hub_module(name: str, path: Path) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingInputError(
            f"{path}: needs the package {name.partition('.')[0]}, which is not installed. Install "
            "it with: pip install 'dragkit[hub]'"
        ) from error


def starts(path: Path, size: int = 65536) -> bytes:
    """Returns the first bytes of a file, decompressed."""
    with open_source(path) as stream:
        try:
            return stream.read(size).removeprefix(_BOM)
        except BROKEN_GZIP:
            return b""


class Container(NamedTuple):
    """How a file holds records.

    Attributes:
        name: in words.
        rows: yields its records.
        separator: stands between the columns of a table, empty in other files.
        header: columns that the file names before its first record.
    """

    name: str
    rows: Callable[[], Rows]
    separator: str = ""
    header: tuple[str, ...] = ()

    def columns(self) -> tuple[str, ...]:
        """Returns the header, or the columns of the first record that can be read."""
        records = (item for item in self.rows() if isinstance(item, Record))
        return self.header or tuple(next((record.fields for record in records), ()))


def container_of(path: Path, *, has_header: bool = True) -> Container | None:
    """Recognises how a file holds records by its first bytes, None if it does not."""
    start = starts(path)
    if start.startswith(b"PAR1"):
        return Container("parquet", partial(parquet_rows, path), header=_parquet_columns(path))
    if start.startswith((b"ARROW1", _ARROW_STREAM)):
        return Container("Arrow", partial(arrow_rows, path))
    if start.lstrip().startswith((b"{", b"[")):
        return Container("JSON lines", partial(json_rows, path))
    first = next((line for line in start.splitlines() if line.strip()), b"")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if ".tsv" in suffixes or (b"\t" in first and ".csv" not in suffixes):
        name, separator = "TSV", "\t"
    elif ".csv" in suffixes or b"," in first:
        name, separator = "CSV", ","
    else:
        return None
    rows = partial(table_rows, path, separator, has_header=has_header)
    lines = (item for item in _cells(path, separator) if not isinstance(item, SourceProblem))
    header = next((cells for _, cells in lines), []) if has_header else []
    return Container(name, rows, separator, tuple(header))
