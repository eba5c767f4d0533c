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
from dragkit.data.build.zstandard import BrokenZstd, check_whole
from dragkit.data.lines import BROKEN_GZIP, open_source
from dragkit.data.question_row import Triple

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

logger = logging.getLogger(__name__)

_BATCH = 100_000
_COPY_BYTES = 1 << 20
# DuckDB is to give whole lines, because its own columns lose some: it takes a row with one empty
# column too many, and cuts spaces beside quotes. NUL is no part of a name, so a line is one column.
# A NUL makes a second one, even at the end of the line. By default a buffer holds 16 of the longest
# lines, and there are several, which the memory limit does not allow.
_LINES = (
    "header = false, auto_detect = false, delim = '\0', quote = '', escape = '', comment = '', "
    "columns = {'line': 'VARCHAR', 'rest': 'VARCHAR'}, null_padding = true, nullstr = '\1', "
    f"new_line = '\\n', max_line_size = {MAX_LINE_BYTES}, "
    f"buffer_size = {MAX_LINE_BYTES}"
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
    is_fast = file.layout == "separated text" and not _has_return_before(file)
    if is_fast and _load_fast(connection, file, work):
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


def _has_return_before(file: GraphFile) -> bool:
    """Whether a carriage return is above the facts. DuckDB would then skip the whole file."""
    lines = islice(lines_of(file), file.first_line - 1)
    return any(line is None or b"\r" in line for _, line in lines)


def _load_fast(connection: DuckDBPyConnection, file: GraphFile, work: Path) -> bool:
    """Whether DuckDB could load the file. It refuses carriage returns and every fault."""
    import duckdb

    # A damaged file and a full disk are the same exception. The slow reader tells them apart.
    refusals = (duckdb.ConstraintException, duckdb.InvalidInputException, duckdb.IOException)
    separator = file.separator.replace("'", "''")
    head, relation, tail = (f"part[{position + 1}]" for position in file.positions)
    # The table refuses a NULL, and with it a line with another number of columns.
    whole = f"rest IS NULL AND len(part) = {file.width}"
    copy = work / "unpacked"
    try:
        path, compression = _readable(file, copy)
        connection.execute(
            f"INSERT INTO raw SELECT CASE WHEN {whole} THEN {head} END, {relation}, {tail} "
            f"FROM (SELECT string_split(line, '{separator}') AS part, rest FROM "
            f"read_csv({quoted_path(path)}, {_LINES}, compression = '{compression}', "
            f"skip = {file.first_line - 1}))"
        )
    except (*refusals, *BROKEN_GZIP, BrokenZstd) as error:
        reason = str(error).partition("\n")[0]
        logger.info("%s: reading it line by line, because of: %s", file.path, reason)
        return False
    finally:
        copy.unlink(missing_ok=True)
    return True


def _readable(file: GraphFile, copy: Path) -> tuple[Path, str]:
    """A path for DuckDB and its compression. DuckDB does not check the sums of gzip, and one thread
    unpacks while the others wait, so gzip is unpacked here.
    """
    if file.compression == "zstd":
        check_whole(file.path)
        return file.path, "zstd"
    if file.compression == "none":
        return file.path, "none"
    with open_source(file.path) as source, copy.open("wb") as target:
        shutil.copyfileobj(source, target, _COPY_BYTES)
    return copy, "none"
