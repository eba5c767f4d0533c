"""Questions of any published layout, one after the other, with all their faults at the end."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from dragkit.data.build.layouts import Found, find_layout
from dragkit.data.build.record_questions import Reading
from dragkit.data.build.source_question import SourceProblem, SourceQuestion
from dragkit.errors import ConfigError, DataError

__all__ = ["Source", "SourceProblem", "SourceQuestion", "open_source_questions"]

logger = logging.getLogger(__name__)

# A file read in a wrong layout has a fault on every line.
_MAX_LISTED = 1000


class Source:
    """Iterates over the questions of a source and collects the problems of its other lines.

    One question is in memory at a time, besides the ids of all.

    Attributes:
        path: the file, the folder or the hub name.
        layout: name of the layout, a key of `LAYOUTS`.
        description: the layout in words, for the output.
        files: the files that are read, in order.
        side_files: the files beside them that name their entities and relations.
        problems: problems so far, in file and line order.
        rows: number of questions and problems so far.
    """

    def __init__(self, path: str | Path, found: Found) -> None:
        self.path = path
        self.layout = found.layout
        self.description = found.description
        self.files = tuple(part.file for part in found.parts)
        self.side_files: tuple[Path, ...] = ()
        if found.layout == "nsm":
            folders = {file.parent for file in self.files}
            beside = {file for folder in folders for file in folder.iterdir() if file.is_file()}
            self.side_files = tuple(sorted(beside - set(self.files)))
        self.problems: list[SourceProblem] = []
        self.rows = 0
        self._parts = found.parts

    def __iter__(self) -> Iterator[SourceQuestion]:
        """Yields the usable questions in file order. Call `check` afterwards."""
        self.problems, self.rows = [], 0
        first: dict[tuple[str | None, str], tuple[int, int]] = {}
        for index, part in enumerate(self._parts):
            for item in part.items():
                self.rows += 1
                if isinstance(item, SourceProblem):
                    self.problems.append(item)
                    continue
                name, line = item.question.id, item.question.line
                at, number = first.setdefault((item.split, name), (index, line))
                if (at, number) == (index, line):
                    yield replace(item, file=part.file)
                    continue
                where = f"on line {number}" + ("" if at == index else f" of {self.files[at]}")
                reason = f"the same id as {where}: {name!r}"
                self.problems.append(SourceProblem(part.file, line, "$.id", reason))

    def check(self) -> None:
        """Raises if a line cannot be used, or if there is no question.

        Raises:
            DataError: it lists the problems as `file:line: path: reason`, and their number.
        """
        if not self.rows:
            raise DataError(f"{self.path}: holds no question, read as {self.description}.")
        if self.problems:
            listed = [str(problem) for problem in self.problems[:_MAX_LISTED]]
            if more := len(self.problems) - len(listed):
                listed.append(f"{self.path}: and {more} more problems.")
            raise DataError(
                "\n".join(listed)
                + f"\n{self.path}: {len(self.problems)} of {self.rows} rows cannot be used, read "
                f"as {self.description}. Correct the rows, or state another layout."
            )


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
        ConfigError: no such layout or field, or a negative limit.
        DataError: the layout is not recognised (lists those that are).
        MissingInputError: no such file or folder, or it is of no use.
    """
    if limit_triples is not None and limit_triples < 0:
        raise ConfigError(f"limit_triples: a number of triples is needed, got {limit_triples}.")
    reading = Reading(dict(columns or {}), separator, limit_triples, entity_ids)
    found = find_layout(path, layout, reading)
    logger.info("%s: %s", path, found.description)
    return Source(path, found)
