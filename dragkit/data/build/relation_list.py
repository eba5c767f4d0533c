"""Relations that a user names: in a flag, or in a file with one on each line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dragkit.data.build.graph import Graph, find_name
from dragkit.data.lines import numbered_lines, open_source
from dragkit.errors import DataError

_MAX_LINE_BYTES = 1 << 20
_MAX_LISTED = 20


def read_names(path: Path) -> list[tuple[str, str]]:
    """Reads one name from each line of a file. Blank lines are skipped.

    Returns:
        Pairs of a place, `file:line`, and a name.

    Raises:
        DataError: a line is too long or not UTF-8.
        MissingInputError: the file cannot be opened.
    """
    names = []
    with open_source(path) as stream:
        for number, line in numbered_lines(stream, _MAX_LINE_BYTES):
            place = f"{path}:{number}"
            if line is None:
                raise DataError(f"{place}: name: the line is too long for a name.")
            try:
                name = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: name: not valid UTF-8.") from error
            if name:
                names.append((place, name))
    return names


def relation_rows(graph: Graph, names: Iterable[tuple[str, str]]) -> np.ndarray:
    """Finds relations by name.

    Args:
        graph: the graph.
        names: pairs of a place, for messages, and a name.

    Returns:
        int64 [k], distinct rows in ascending order.

    Raises:
        DataError: the graph lacks some. Each is listed with its place and names that are like it.
    """
    rows, unknown = set(), []
    for place, name in names:
        if (row := find_name(graph.relations, name)) is None:
            unknown.append((place, name))
        else:
            rows.add(row)
    if unknown:
        known = [graph.relations[row] for row in range(len(graph.relations))]
        lines = [f"{place}: {_unknown(name, known)}" for place, name in unknown[:_MAX_LISTED]]
        if more := len(unknown) - len(lines):
            lines.append(f"... and {more} more.")
        raise DataError("\n".join(lines))
    return np.array(sorted(rows), dtype=np.int64)


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f" Similar ones are {', '.join(map(repr, near))}." if near else ""
    return f"relation: the graph has no relation {name!r}.{hint}"
