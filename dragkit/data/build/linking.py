"""Finds the entities of a graph that a question names, exactly or by an alias."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ahocorasick_rs import AhoCorasick, Implementation, MatchKind

from dragkit.data.build.folding import EDGE, fold, fold_with_places, mark_edges
from dragkit.data.build.graph import Graph, Names, find_name
from dragkit.data.build.records import text_cells
from dragkit.data.build.source_question import SourceProblem
from dragkit.errors import DataError

_MAX_LISTED = 1000


class Mention(NamedTuple):
    """A place in a text where an entity is named.

    Attributes:
        start, end: the characters `text[start:end]`.
        row: row of the entity.
        name: its name, which an alias or another letter case may stand for in the text.
    """

    start: int
    end: int
    row: int
    name: str


class EntityLinker:
    """Finds names of entities in texts: whole words, in any letter case and Unicode form.

    At each place the longest name counts, and what follows it is searched further, so mentions do
    not overlap. Where several entities have one folded name, that with the most facts is taken,
    then the first row. Names are taken before aliases.

    Args:
        names: names of the entities by row.
        degree: int [N] number of facts by row.
        aliases: pairs of another name and a row.
        min_length: characters that a name needs after folding.
        max_mentions: the longest so many of a text are kept. 0 keeps all.
        stop_words: names that are never found, in any letter case.
    """

    def __init__(
        self,
        names: Names,
        degree: np.ndarray,
        *,
        aliases: Iterable[tuple[str, int]] = (),
        min_length: int = 1,
        max_mentions: int = 0,
        stop_words: Iterable[str] = (),
    ) -> None:
        self._names = names
        self.max_mentions = max_mentions
        stopped = {fold(word) for word in stop_words}
        row_of: dict[str, int] = {}

        def add(name: str, row: int, found: dict[str, int]) -> None:
            folded = fold(name)
            if len(folded) < min_length or folded in stopped or not folded.strip():
                return
            known = found.setdefault(mark_edges(folded)[0], row)
            if (-degree[row], row) < (-degree[known], known):
                found[mark_edges(folded)[0]] = row

        for row in range(len(names)):
            add(names[row], row, row_of)
        other: dict[str, int] = {}
        for alias, row in aliases:
            add(alias, row, other)
        for pattern, row in other.items():
            row_of.setdefault(pattern, row)
        self._rows = np.fromiter(row_of.values(), dtype=np.int32, count=len(row_of))
        # A DFA would take several times the memory and finds little faster.
        self._automaton = AhoCorasick(
            row_of,
            matchkind=MatchKind.LeftmostLongest,
            implementation=Implementation.ContiguousNFA,
            store_patterns=False,
        )

    @classmethod
    def of_graph(
        cls, graph: Graph, alias_file: str | Path | None = None, **options: int
    ) -> EntityLinker:
        """Returns the linker of a graph.

        Args:
            graph: its entities are found.
            alias_file: lines of an alias, a tab and an entity, plain or gzip.
            options: `min_length` and `max_mentions`.

        Raises:
            DataError: a line of the alias file cannot be used.
            MissingInputError: the alias file cannot be read.
        """
        aliases = read_aliases(alias_file, graph.entities) if alias_file is not None else []
        return cls(graph.entities, graph.degree(), aliases=aliases, **options)

    def link(self, text: str) -> tuple[Mention, ...]:
        """Returns the mentions of a text in its order."""
        folded, text_places = fold_with_places(text)
        marked, folded_places = mark_edges(folded.replace(EDGE, " "))
        mentions = []
        for index, start, end in self._automaton.find_matches_as_indexes(marked):
            row = int(self._rows[index])
            begin = text_places[folded_places[start]]
            # The place after the last character, past the others that it was folded with.
            last = text_places[folded_places[end - 1 - (marked[end - 1] == EDGE)]]
            stop = next(place for place in text_places[folded_places[end - 1] :] if place > last)
            mentions.append(Mention(begin, stop, row, self._names[row]))
        if 0 < self.max_mentions < len(mentions):
            longest = sorted(mentions, key=lambda m: (m.start - m.end, m.start))
            mentions = sorted(longest[: self.max_mentions])
        return tuple(mentions)


def read_aliases(path: str | Path, names: Names) -> list[tuple[str, int]]:
    """Reads a file of aliases: an alias, a tab, and the name of an entity.

    Raises:
        DataError: lines have no two columns, or name no entity. It lists all of them.
        MissingInputError: the file cannot be read.
    """
    path = Path(path)
    aliases: list[tuple[str, int]] = []
    problems: list[str] = []
    for item in text_cells(path, "\t"):
        problem = _alias(path, item, names, aliases)
        if problem is not None:
            problems.append(str(problem))
    if problems:
        more = len(problems) - _MAX_LISTED
        tail = [f"{path}: and {more} more problems."] if more > 0 else []
        raise DataError("\n".join([*problems[:_MAX_LISTED], *tail]))
    return aliases


def _alias(
    path: Path,
    item: tuple[int, list[str]] | SourceProblem,
    names: Names,
    aliases: list[tuple[str, int]],
) -> SourceProblem | None:
    if isinstance(item, SourceProblem):
        return item
    number, cells = item
    if len(cells) != 2:
        return SourceProblem(path, number, "$", "expected an alias, a tab and an entity")
    row = find_name(names, cells[1])
    if row is None:
        return SourceProblem(path, number, "$[1]", f"no entity of the graph is called {cells[1]!r}")
    aliases.append((cells[0], row))
    return None
