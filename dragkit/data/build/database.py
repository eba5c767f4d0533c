"""DuckDB, with its errors as the package's own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dragkit.errors import ConfigError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def connect(database: str | Path = ":memory:", **settings: object) -> DuckDBPyConnection:
    """Connects to DuckDB so that it prints nothing and fetches nothing.

    Raises:
        duckdb.ParserException: a setting has no such value.
    """
    import duckdb

    # No extension is needed.
    quiet = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}
    connection = duckdb.connect(str(database), config={**settings, **quiet})
    # The bar would go to stdout.
    connection.execute("SET enable_progress_bar = false")
    return connection


@contextmanager
def open_database(folder: Path, *, memory_limit: str, threads: int) -> Iterator[DuckDBPyConnection]:
    """A new database in a folder, which may also hold what does not fit into memory.

    Raises:
        ConfigError: the memory limit is no size, or too small for what is done.
        OSError: the disk is full or fails.
    """
    import duckdb

    try:
        connection = connect(
            folder / "graph.duckdb",
            memory_limit=memory_limit,
            threads=threads,
            temp_directory=str(folder / "spill"),
        )
    except duckdb.ParserException as error:
        raise ConfigError(f"memory limit {memory_limit!r}: no size. Write it like 1GB.") from error
    try:
        with connection:
            yield connection
    except duckdb.OutOfMemoryException as error:
        raise ConfigError(
            f"memory limit {memory_limit}: too little to sort this graph: "
            f"{str(error).splitlines()[0]}. Raise the limit, or use fewer threads."
        ) from error
    except duckdb.IOException as error:
        raise OSError(str(error).splitlines()[0]) from error


def quoted_path(path: Path) -> str:
    """The path as an SQL text that DuckDB takes for one file, not for a pattern."""
    pattern = re.sub(r"[][*?]", lambda found: f"[{found[0]}]", str(path.absolute()))
    return "'" + pattern.replace("'", "''") + "'"
