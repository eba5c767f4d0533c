"""Facts of a graph file, line by line, and what is wrong with the other lines."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator

from dragkit.data.build.graph_faults import GraphFaults
from dragkit.data.build.graph_files import MAX_LINE_BYTES, PARTS, GraphFile, csv_reader, lines_of
from dragkit.data.build.ntriples import parse_statement
from dragkit.data.build.zstandard import BrokenZstd
from dragkit.data.lines import BROKEN_GZIP
from dragkit.data.question_row import Triple

_SURROGATE = re.compile("[\ud800-\udfff]")


def read_facts(file: GraphFile, faults: GraphFaults) -> Iterator[Triple]:
    """Yields the facts of the usable lines. The faults of the others go to `faults`.

    Names are kept as they are, spaces and quotes included, except for the quotes of CSV. Blank
    lines are skipped. This is the definition of every layout. DuckDB only reads faster.
    """
    reader = {"separated text": _separated, "CSV": _quoted, "N-Triples": _statements}
    lines = _Lines(file, faults)
    try:
        for number, triple in reader[file.layout](file, lines, faults):
            if (fault := _name_fault(triple)) is None:
                yield triple
            else:
                faults.add(file.path, number, *fault)
    except BROKEN_GZIP as error:
        reason = f"the gzip data is cut or damaged: {error}"
        faults.add(file.path, lines.number + 1, "line", reason)
    except BrokenZstd as error:
        faults.add(file.path, error.line, "line", str(error))


class _Lines:
    """Lines as text without their ends. What is not UTF-8 becomes surrogates, found later.

    Attributes:
        number: of the last line.
    """

    def __init__(self, file: GraphFile, faults: GraphFaults) -> None:
        self.file, self.faults = file, faults
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        for number, line in lines_of(self.file):
            self.number = number
            if line is None:
                reason = f"{MAX_LINE_BYTES} bytes or more are too long"
                self.faults.add(self.file.path, number, "line", reason)
            # A skipped line is still yielded, as a blank one, so that the numbers stay right.
            skipped = line is None or number < self.file.first_line
            yield "" if skipped or line is None else line.decode("utf-8", "surrogateescape")


def _name_fault(triple: Triple) -> tuple[str, str] | None:
    for part, name in zip(PARTS, triple, strict=True):
        if not name:
            return part, "an empty name"
        if "\0" in name:
            return part, "a NUL character"
        # Whether a text is ASCII is known without looking at its characters.
        if not name.isascii() and _SURROGATE.search(name):
            return part, "not valid UTF-8"
    return None


def _pick(
    fields: list[str], file: GraphFile, number: int, faults: GraphFaults
) -> tuple[int, Triple] | None:
    if len(fields) != file.width:
        reason = f"{len(fields)} found, {file.width} expected, with {file.separator!r} between them"
        faults.add(file.path, number, "columns", reason)
        return None
    head, relation, tail = file.positions
    return number, (fields[head], fields[relation], fields[tail])


def _separated(file: GraphFile, lines: _Lines, faults: GraphFaults) -> Iterator[tuple[int, Triple]]:
    for line in lines:
        text = line.removesuffix("\n").removesuffix("\r")
        if text and (row := _pick(text.split(file.separator), file, lines.number, faults)):
            yield row


def _quoted(file: GraphFile, lines: _Lines, faults: GraphFaults) -> Iterator[tuple[int, Triple]]:
    reader = csv_reader(lines, file.separator)
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            faults.add(file.path, number, "line", f"no row of CSV: {error}")
            continue
        if fields and (row := _pick(fields, file, number, faults)):
            yield row


def _statements(
    file: GraphFile, lines: _Lines, faults: GraphFaults
) -> Iterator[tuple[int, Triple]]:
    for line in lines:
        try:
            triple = parse_statement(line.rstrip("\r\n"))
        except ValueError as error:
            faults.add(file.path, lines.number, "line", str(error))
            continue
        if triple is not None:
            yield lines.number, triple
