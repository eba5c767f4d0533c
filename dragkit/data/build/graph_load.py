"""Loading a graph file into DuckDB: by DuckDB itself where it can, else line by line."""

from __future__ import annotations

import logging
import shutil
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dragkit.data.build.database import quoted_path
from dragkit.data.build.graph_faults import GraphFaults
from dragkit.data.build.graph_files import MAX_LINE_BYTES, PARTS, GraphFile, lines_of
from dragkit.data.build.graph_rows import read_facts
from dragkit.data.lines import BROKEN_GZIP, open_source
from dragkit.data.question_row import Triple

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

logger = logging.getLogger(__name__)

_BATCH = 100_000
_COPY_BYTES = 1 << 20
# DuckDB is to give whole lines, because its own columns lose some: it takes a row with one empty
# column too many, and cuts spaces beside quotes. NUL is no part of a name, so a line is one column.
# A NUL makes a second one, even at the end of the line.
_LINES = (
    "header = false, auto_detect = false, delim = '\0', quote = '', escape = '', comment = '', "
    "columns = {'line': 'VARCHAR', 'rest': 'VARCHAR'}, null_padding = true, nullstr = '\1', "
    "new_line = '\\n'"
)


def create_table(connection: DuckDBPyConnection) -> None:
    """Creates the table `raw` of facts as names, in no order, which refuses faulty ones."""
    columns = ", ".join(
        f"{part} VARCHAR NOT NULL CHECK ({part} <> '' AND NOT contains({part}, chr(0)))"
        for part in PARTS
    )
    connection.execute("SET preserve_insertion_order = false")
    connection.execute(f"CREATE TABLE raw ({columns})")


def load_file(
    connection: DuckDBPyConnection, file: GraphFile, work: Path, faults: GraphFaults
) -> None:
    """Puts the facts of a file into `raw`.

    Args:
        work: folder for an unpacked copy.
        faults: gets the faults of the file, each with its line. Some facts may then be missing.
    """
    is_text = file.layout == "separated text" and file.compression != "zstd"
    if is_text and _load_fast(connection, file, work):
        return
    facts = read_facts(file, faults)
    while batch := list(islice(facts, _BATCH)):
        _insert(connection, batch)


def _insert(connection: DuckDBPyConnection, batch: list[Triple]) -> None:
    columns = zip(PARTS, zip(*batch, strict=True), strict=True)
    arrays = {part: np.array(names, dtype=object) for part, names in columns}
    connection.register("batch", arrays)
    connection.execute(f"INSERT INTO raw SELECT {', '.join(PARTS)} FROM batch")
    connection.unregister("batch")


def _load_fast(connection: DuckDBPyConnection, file: GraphFile, work: Path) -> bool:
    """Whether DuckDB could load the file. It refuses carriage returns and every fault."""
    import duckdb

    # A failing and a full disk are the same exception. The slow reader tells them apart.
    refusals = (duckdb.ConstraintException, duckdb.InvalidInputException, duckdb.IOException)
    copy = work / "unpacked"
    connection.begin()
    try:
        above = [line or b"\r" for _, line in islice(lines_of(file), file.first_line - 1)]
        path = _unpack(file, copy) if file.compression == "gzip" else file.path
        expected = _count_lines(path) - sum(line != b"\n" for line in above)
        # DuckDB skips the whole file where a carriage return is above the facts. It loses a line
        # that is longer than its buffer, or that starts with a buffer and has no end.
        if _insert_lines(connection, file, path) == expected:
            connection.commit()
            return True
        reason = "it lost some lines"
    except (*refusals, *BROKEN_GZIP) as error:
        reason = str(error).partition("\n")[0]
    finally:
        copy.unlink(missing_ok=True)
    connection.rollback()
    logger.info("%s: reading it line by line, because DuckDB stopped: %s", file.path, reason)
    return False


def _insert_lines(connection: DuckDBPyConnection, file: GraphFile, path: Path) -> int:
    """Puts the facts of plain separated text into `raw` and returns their number."""
    separator = file.separator.replace("'", "''")
    head, relation, tail = (f"part[{position + 1}]" for position in file.positions)
    # The table refuses a NULL, and with it a line with another number of columns.
    whole = f"rest IS NULL AND len(part) = {file.width}"
    # By default a buffer holds 16 of the longest lines, and the memory limit not several of these.
    sizes = f"max_line_size = {MAX_LINE_BYTES}, buffer_size = {MAX_LINE_BYTES}"
    return connection.execute(
        f"INSERT INTO raw SELECT CASE WHEN {whole} THEN {head} END, {relation}, {tail} "
        f"FROM (SELECT string_split(line, '{separator}') AS part, rest FROM "
        f"read_csv({quoted_path(path)}, {_LINES}, {sizes}, skip = {file.first_line - 1}))"
    ).fetchall()[0][0]


def _unpack(file: GraphFile, copy: Path) -> Path:
    """DuckDB does not check the sums of gzip, and unpacks with one thread while others wait."""
    with open_source(file.path) as source, copy.open("wb") as target:
        shutil.copyfileobj(source, target, _COPY_BYTES)
    return copy


def _count_lines(path: Path) -> int:
    """Number of the lines that are not empty."""
    count, last = 0, b"\n"
    with path.open("rb") as file:
        while chunk := file.read(_COPY_BYTES):
            is_end = np.frombuffer(last + chunk, dtype=np.uint8) == ord("\n")
            count += int(np.count_nonzero(is_end[1:] & ~is_end[:-1]))
            last = chunk[-1:]
    return count + (last != b"\n")
