"""Graph files: how each of them is to be read, decided by its name, its first line and options."""

from __future__ import annotations

import csv
import gzip
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dragkit.data.build.graph_faults import GraphFaults
from dragkit.data.build.zstandard import ZSTD_MAGIC, BrokenZstd, zstd_lines
from dragkit.data.lines import BROKEN_GZIP, numbered_lines, open_source
from dragkit.errors import ConfigError, DataError, MissingInputError

logger = logging.getLogger(__name__)

Layout = Literal["separated text", "CSV", "N-Triples"]
Compression = Literal["none", "gzip", "zstd"]

# A line of this length or longer is a fault. Real names are below 1 MB.
MAX_LINE_BYTES = 16 << 20
BOM = b"\xef\xbb\xbf"
PARTS = ("head", "relation", "tail")
# A first line with one name of each is a header, not a fact.
_HEADER = (
    {"head", "head_entity", "subject", "source", "from"},
    {"relation", "relation_type", "predicate", "property", "edge"},
    {"tail", "tail_entity", "object", "target", "to"},
)
_LAYOUTS: dict[str, Layout] = {
    ".tsv": "separated text",
    ".tab": "separated text",
    ".txt": "separated text",
    ".csv": "CSV",
    ".nt": "N-Triples",
    ".ntriples": "N-Triples",
}
_OTHER_RDF = (".ttl", ".turtle", ".n3", ".rdf", ".owl", ".xml", ".nq", ".trig", ".jsonld")
_COMPRESSED = (".gz", ".zst", ".zstd")


@dataclass(frozen=True, slots=True)
class GraphFile:
    """How one file is read.

    Attributes:
        path: the file.
        layout: separated text has no quotes, CSV has.
        compression: by the first bytes.
        separator: between columns. Empty for N-Triples.
        width: number of columns of every line.
        positions: columns of head, relation and tail, from 0.
        first_line: lines before this one are a header or blank. The first line of a file is 1.
    """

    path: Path
    layout: Layout
    compression: Compression
    separator: str = ""
    width: int = 3
    positions: tuple[int, int, int] = (0, 1, 2)
    first_line: int = 1

    @property
    def options(self) -> tuple[object, ...]:
        """What the facts depend on besides the content."""
        return (self.layout, self.separator, self.width, self.positions, self.first_line)

    def describe(self) -> str:
        """Says how the file is read."""
        if self.layout == "N-Triples":
            return self.layout
        columns = ", ".join(str(position + 1) for position in self.positions)
        header = "after a header" if self.first_line > 1 else "without a header"
        return (
            f"{self.layout} with separator {self.separator!r}, columns {columns} of {self.width}, "
            f"{header}"
        )


def inspect_file(
    path: Path, columns: Sequence[str] | None, separator: str | None, faults: GraphFaults
) -> GraphFile | None:
    """Decides how a graph file is read, and logs it.

    Args:
        path: .tsv, .tab, .txt, .csv or .nt, plain, gzip or Zstandard. Any name with a separator.
        columns: names in the header, or numbers from 1 where there is no header, of head, relation
            and tail. None means three columns. Their header may be absent.
        separator: between columns. None means a comma for .csv, else a tab.
        faults: gets what is wrong with the data or the first line. None is then returned.

    Raises:
        ConfigError: the columns or the separator do not fit the file's kind.
        DataError: the content is not of the compression that the name says.
        MissingInputError: the file is missing, is no regular file, or of an unknown kind.
    """
    compression = _compression(path)
    layout = _layout(path, separator)
    if layout == "N-Triples":
        if columns is not None or separator is not None:
            raise ConfigError(
                f"{path}: N-Triples have no columns and no separator. Leave them out."
            )
        file: GraphFile | None = GraphFile(path, layout, compression)
    else:
        if separator is None:
            separator = "," if layout == "CSV" else "\t"
        _check_options(columns, separator, layout)
        file = _with_columns(GraphFile(path, layout, compression, separator), columns, faults)
    if file is not None:
        logger.info("%s: read as %s", path, file.describe())
    return file


def csv_reader(lines: Iterable[str], separator: str) -> Any:
    """A strict reader of CSV. The csv module does not name its type."""
    # The module's default is below the length of a long name. Readers have no such setting.
    csv.field_size_limit(MAX_LINE_BYTES)
    return csv.reader(lines, delimiter=separator, strict=True)


def lines_of(file: GraphFile) -> Iterator[tuple[int, bytes | None]]:
    """Yields numbered lines with their ends. One of `MAX_LINE_BYTES` or more is None.

    A byte order mark at the start of the file is left out.

    Raises:
        EOFError, gzip.BadGzipFile, zlib.error: a gzip file is damaged, see `BROKEN_GZIP`.
        BrokenZstd: a Zstandard file is damaged, or holds a line that is not UTF-8.
    """
    if file.compression == "zstd":
        yield from zstd_lines(file.path, MAX_LINE_BYTES)
        return
    with open_source(file.path) as stream:
        for number, line in numbered_lines(stream, MAX_LINE_BYTES):
            if number == 1 and line is not None:
                line = line.removeprefix(BOM)
            yield number, line


def _compression(path: Path) -> Compression:
    with open_source(path) as stream, path.open("rb") as raw:
        if raw.read(len(ZSTD_MAGIC)) == ZSTD_MAGIC:
            return "zstd"
        if path.suffix in (".zst", ".zstd"):
            raise DataError(
                f"{path}: the name ends in {path.suffix}, but the content is not Zstandard."
            )
        return "gzip" if isinstance(stream, gzip.GzipFile) else "none"


def _layout(path: Path, separator: str | None) -> Layout:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if suffix in _OTHER_RDF:
        raise MissingInputError(
            f"{path}: this kind of RDF is not read. Convert it to N-Triples first, for example "
            "with: riot --output=ntriples FILE > graph.nt"
        )
    if suffix in _LAYOUTS:
        return _LAYOUTS[suffix]
    if separator is not None:
        return "separated text"
    raise MissingInputError(
        f"{path}: no known kind of graph file. Its name may end in {', '.join(_LAYOUTS)}, each "
        "also with .gz or .zst. For other text with columns name their separator."
    )


def _check_options(columns: Sequence[str] | None, separator: str, layout: Layout) -> None:
    if (
        not separator
        or any(char in separator for char in '\n\r\0"')
        or (layout == "CSV" and len(separator) != 1)
    ):
        raise ConfigError(f"separator: {separator!r} cannot separate columns. Name one character.")
    if columns is not None and len(columns) != len(PARTS):
        raise ConfigError(
            f"columns: {len(columns)} given, 3 needed: those of head, relation and tail."
        )


def _with_columns(
    file: GraphFile, columns: Sequence[str] | None, faults: GraphFaults
) -> GraphFile | None:
    try:
        number, fields, following = _first_row(file)
    except (*BROKEN_GZIP, BrokenZstd, csv.Error) as error:
        faults.add(file.path, None, "line", f"the first line cannot be read: {error}")
        return None
    if columns is None:
        names = [field.strip().casefold() for field in fields]
        has_header = len(names) == 3 and all(
            name in usual for name, usual in zip(names, _HEADER, strict=True)
        )
        return replace(file, first_line=following if has_header else number)
    if all(column.isdecimal() and column.isascii() for column in columns):
        positions = tuple(int(column) - 1 for column in columns)
        if fields and not all(0 <= position < len(fields) for position in positions):
            reason = (
                f"{len(fields)} found with {file.separator!r} between them, but numbers "
                f"{', '.join(columns)} are asked for. The first is 1"
            )
            faults.add(file.path, number, "columns", reason)
            return None
        return replace(file, width=len(fields), positions=positions, first_line=number)
    for column in columns:
        if fields.count(column) != 1:
            found = ", ".join(map(repr, fields[:20]))
            reason = f"{fields.count(column)} columns are called {column!r}. They are {found}"
            faults.add(file.path, number, "header", reason)
            return None
    positions = tuple(fields.index(column) for column in columns)
    return replace(file, width=len(fields), positions=positions, first_line=following)


def _first_row(file: GraphFile) -> tuple[int, list[str], int]:
    """The first row that is not blank: its line, its fields, and the line after it."""
    texts = ((line or b"").decode("utf-8", "surrogateescape") for _, line in lines_of(file))
    if file.layout == "CSV":
        reader = csv_reader(texts, file.separator)
        start = 1
        for fields in reader:
            if fields:
                return start, fields, reader.line_num + 1
            start = reader.line_num + 1
    else:
        for number, text in enumerate(texts, start=1):
            if content := text.removesuffix("\n").removesuffix("\r"):
                return number, content.split(file.separator), number + 1
    return 1, [], 1
