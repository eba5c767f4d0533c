"""Graph files, indexed once into a cache folder and memory-mapped from then on.

DuckDB does the dictionary and the sorting. It works beyond its memory limit, on disk; it is one
package without others below it; it reads and gives NumPy arrays. Polars holds the dictionary of a
graph in memory, and its answers need Arrow.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dragkit.data.arrays import (
    FolderWriter,
    Strings,
    cache_key,
    open_or_build,
    open_sealed,
    read_array,
    remembered_digest,
    seal_folder,
)
from dragkit.data.build.database import open_database
from dragkit.data.build.graph import Graph
from dragkit.data.build.graph_faults import GraphFaults
from dragkit.data.build.graph_files import GraphFile, inspect_file
from dragkit.data.build.graph_load import create_table, load_file
from dragkit.data.cache import cache_root
from dragkit.errors import DataError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

logger = logging.getLogger(__name__)

# Part of every key. Raise it when the same files give other arrays.
BUILDER_VERSION = 1
CACHE_FOLDER = "graphs-1"
_WORK = "work"
_CHUNK = 1 << 20
# More threads need more memory than the default limit.
_MAX_THREADS = 8
# A line has at most two new entities, and entities are numbered by int32.
_MAX_LINES = 2**30
# Distinct names are found among so many lines' share of them at once. DuckDB's own way beyond its
# memory fails where names are many times larger than that.
_LINES_AT_ONCE = 10_000_000
# From names to ranks of names. `rowid` is the row of a table that was created in an order. Each
# statement holds one thing that can grow beyond memory, because two of them would not give way to
# each other.
_NUMBERING = (
    "CREATE TABLE entity AS SELECT name FROM name ORDER BY name",
    "DROP TABLE name",
    "CREATE TABLE relation AS SELECT DISTINCT relation AS name FROM raw ORDER BY name",
    "CREATE TABLE half AS"
    " SELECT entity.rowid::INTEGER AS head, relation.rowid::INTEGER AS relation, raw.tail FROM raw"
    " JOIN entity ON raw.head = entity.name JOIN relation ON raw.relation = relation.name",
    "DROP TABLE raw",
    "CREATE TABLE line AS SELECT head, relation, entity.rowid::INTEGER AS tail"
    " FROM half JOIN entity ON tail = name",
    "DROP TABLE half",
    "CREATE TABLE distinct_line AS SELECT DISTINCT head, relation, tail FROM line",
    "DROP TABLE line",
    "CREATE TABLE fact AS SELECT * FROM distinct_line ORDER BY head, relation, tail",
    "DROP TABLE distinct_line",
    "CREATE TABLE by_tail AS SELECT tail, rowid::INTEGER AS fact FROM fact ORDER BY tail, fact",
)


def open_graph(
    paths: Sequence[str | Path],
    *,
    columns: Sequence[str] | None = None,
    separator: str | None = None,
    cache_dir: str | Path | None = None,
    memory_limit: str = "1GB",
    threads: int | None = None,
) -> Graph:
    """Opens the graph of all files together. Indexes it first if the cache does not hold it.

    The key depends on the content of the files and on how they are read, not on their names, dates
    and order. A damaged cache folder is rebuilt. A blank node is the same in all files.

    Args:
        paths: TSV, CSV or N-Triples, plain, gzip or Zstandard, see `inspect_file`.
        columns: see `inspect_file`.
        separator: see `inspect_file`.
        cache_dir: cache folder. None takes the user's.
        memory_limit: of DuckDB, such as "1GB". It uses the disk beyond.
        threads: of DuckDB. None takes one for each core, up to eight.

    Raises:
        ConfigError: an option does not fit, or the memory limit is too small.
        DataError: a line cannot be used, there is no fact, or a file changed while it was read.
        MissingInputError: a file cannot be opened.
        WriteError: the cache cannot be written.
    """
    faults = GraphFaults()
    inspected = [inspect_file(Path(path), columns, separator, faults) for path in paths]
    files = [file for file in inspected if file is not None]
    cache = cache_root(cache_dir)
    digests = [remembered_digest(file.path, cache / "digests") for file in files]
    # The facts are a set, so the order of the files says nothing. A file with a fault is not among
    # them, so that it must not open the cache of the others.
    parts = sorted(zip(digests, [repr(file.options) for file in files], strict=True))
    folder = cache / CACHE_FOLDER / cache_key(BUILDER_VERSION, faults.count, parts)
    threads = threads or min(_MAX_THREADS, os.cpu_count() or 1)

    def fill(target: Path) -> None:
        _build(target, files, faults, {"memory_limit": memory_limit, "threads": threads})
        for file, digest in zip(files, digests, strict=True):
            if remembered_digest(file.path, cache / "digests") != digest:
                raise DataError(f"{file.path}: the file changed while it was read. Run again.")

    return open_or_build(folder, lambda: map_graph(folder), fill)


def map_graph(folder: Path) -> Graph:
    """Maps the graph of a cache folder, such as the `folder` of an open graph.

    Raises:
        CorruptCache: a file is missing or differs from the manifest.
    """
    open_sealed(folder)
    names = ("head", "relation", "tail", "head_ptr", "tail_order", "tail_ptr")
    arrays = {name: read_array(folder, name) for name in names}
    strings = [Strings(folder, name) for name in ("entities", "relations")]
    return Graph(*strings, **arrays, folder=folder)


def _build(
    folder: Path, files: Sequence[GraphFile], faults: GraphFaults, options: dict[str, Any]
) -> None:
    work = folder / _WORK
    work.mkdir()
    with open_database(work, **options) as connection:
        create_table(connection)
        for file in files:
            load_file(connection, file, work, faults)
        faults.check()
        lines = _count(connection, "raw")
        paths = ", ".join(str(file.path) for file in files)
        if not lines:
            raise DataError(f"{paths}: no facts. Each line needs a head, a relation and a tail.")
        if lines > _MAX_LINES:
            raise DataError(f"{paths}: {lines} facts. A graph holds at most {_MAX_LINES}.")
        logger.info("%d facts are read; sorting them", lines)
        for statement in (*_naming(lines), *_NUMBERING):
            # Keeping the order where there is none takes memory.
            is_ordered = "true" if " ORDER BY " in statement else "false"
            connection.execute(f"SET preserve_insertion_order = {is_ordered}")
            connection.execute(statement)
        counts = {name: _count(connection, name) for name in ("entity", "relation", "fact")}
        _write(connection, folder, counts)
    shutil.rmtree(work)
    logger.info("%(fact)d distinct facts, %(entity)d entities, %(relation)d relations", counts)
    seal_folder(folder, {"lines": lines, **counts})


def _naming(lines: int) -> Iterator[str]:
    """Statements that make the table of the distinct names of entities, in no order."""
    yield "CREATE TABLE name (name VARCHAR)"
    passes = 1 + lines // _LINES_AT_ONCE
    for number in range(passes):
        names = (
            f"SELECT {column} AS name FROM raw WHERE hash({column}) % {passes} = {number}"
            for column in ("head", "tail")
        )
        yield f"INSERT INTO name {' UNION '.join(names)}"


def _count(connection: DuckDBPyConnection, table: str) -> int:
    return connection.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0]


def _chunks(
    connection: DuckDBPyConnection, table: str, count: int
) -> Iterator[dict[str, np.ndarray]]:
    """The columns of a table in its order, by chunks. DuckDB has no stream of NumPy arrays."""
    for start in range(0, count, _CHUNK):
        rows = f"rowid >= {start} AND rowid < {start + _CHUNK}"
        yield connection.execute(f"SELECT * FROM {table} WHERE {rows} ORDER BY rowid").fetchnumpy()


def _write(connection: DuckDBPyConnection, folder: Path, counts: dict[str, int]) -> None:
    writer = FolderWriter(folder)
    for table, name in (("entity", "entities"), ("relation", "relations")):
        for chunk in _chunks(connection, table, counts[table]):
            writer.strings(name).append(chunk["name"].tolist())
    for table, key, names in (
        ("fact", "head", {"head": "head", "relation": "relation", "tail": "tail"}),
        ("by_tail", "tail", {"fact": "tail_order"}),
    ):
        starts = _Starts(counts["entity"])
        pointers = writer.array(f"{key}_ptr", np.int64)
        for chunk in _chunks(connection, table, counts["fact"]):
            for column, name in names.items():
                writer.array(name, np.int32).append(chunk[column])
            pointers.append(starts.add(chunk[key]))
        pointers.append(starts.end())
    writer.close()


class _Starts:
    """First positions of the entities in a sorted column that comes in chunks."""

    def __init__(self, num_entities: int) -> None:
        self._num_entities = num_entities
        self._next = 0
        self._length = 0

    def add(self, rows: np.ndarray) -> np.ndarray:
        """Returns int64 the starts that a non-empty chunk of rows, ascending, makes known."""
        stop = int(rows[-1]) + 1
        starts = self._length + np.searchsorted(rows, np.arange(self._next, stop, dtype=np.int32))
        self._next = stop
        self._length += len(rows)
        return starts

    def end(self) -> np.ndarray:
        """Returns int64 the starts of the entities that did not occur, and the end."""
        return np.full(self._num_entities + 1 - self._next, self._length, dtype=np.int64)
