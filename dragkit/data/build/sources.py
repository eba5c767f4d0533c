"""Questions of any published layout, one after the other, with all their faults at the end."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from dragkit.data.build.layouts import Files, Layout, Reading, find_layout
from dragkit.data.build.source_question import Item, SourceProblem, SourceQuestion
from dragkit.errors import DataError

__all__ = ["Source", "SourceProblem", "SourceQuestion", "open_source_questions"]

logger = logging.getLogger(__name__)

# A file in another layout than the stated one has a fault on every line.
_MAX_LISTED = 1000


class Source:
    """Iterates over the questions of a source and collects the problems of its other lines.

    One question is in memory at a time, besides the ids of all.

    Attributes:
        layout: name of the layout, as `open_source_questions` takes it.
        description: the layout in words, for the output.
        files: the files that are read, in order.
        problems: problems so far, in file and line order.
        rows: number of questions and problems so far.
    """

    def __init__(self, layout: Layout, files: Files, reading: Reading) -> None:
        self.layout = layout.name
        self.description = layout.description
        self.files = files.paths
        self.problems: list[SourceProblem] = []
        self.rows = 0
        self._items = lambda: layout.read(files, reading)
        self._name = files.root

    def __iter__(self) -> Iterator[SourceQuestion]:
        """Yields the usable questions in file order. Call `check` afterwards."""
        self.problems, self.rows = [], 0
        first: dict[tuple[str | None, str], int] = {}
        for item in self._items():
            self.rows += 1
            if isinstance(item, SourceQuestion):
                key = (item.split, item.question.id)
                line = first.setdefault(key, item.question.line)
        yield from ()

    def check(self) -> None:
        """Raises if a line cannot be used, or if there is no question.

        Raises:
            DataError: it lists all problems as `file:line: path: reason`.
        """


def open_source_questions(
    path: str | Path,
    *,
    layout: str | None = None,
    columns: Mapping[str, str] | None = None,
    separator: str = "|",
    limit_triples: int | None = None,
    entity_ids: bool = False,
) -> Source:
    """Opens questions of a published layout.

    Args:
        path: a file, a folder, or `hf:NAME` for a data set of the Hugging Face hub.
        layout: one of `LAYOUTS`. By default the content decides.
        columns: columns of a table or keys of JSON lines, by field (`FIELDS`). They replace the
            usual names.
        separator: stands between answers, and between topics, in a cell of a table.
        limit_triples: facts kept of the questions' own graphs, first in file order. The earlier
            implementation kept 50.
        entity_ids: name entities by their ids where the source has ids and names (NSM, WebQSP).

    Raises:
        DataError: the layout is not recognised (lists those that are).
        MissingInputError: no such file or folder, or it is of no use.
    """
    reading = Reading(dict(columns or {}), separator, limit_triples, entity_ids)
    chosen, files = find_layout(path, layout, reading)
    logger.info("%s: %s", path, chosen.description)
    return Source(chosen, files, reading)
