"""Finds the entities of a graph that a question names, exactly or by an alias."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ahocorasick_rs import AhoCorasick, Implementation, MatchKind

from dragkit.data.build.folding import (
    EDGE,
    fold,
    fold_with_places,
    mark_edges,
    mark_edges_with_places,
    width,
)
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
    not overlap. Where several entities have one folded name, that spelled as in the text is taken,
    then that with the most facts, then the first row. Names are taken before aliases. Where a
    mention has the capitals of its name, lower-case mentions of capitalised names in the same text
    are left out: in "which movie did Ada Reed direct" they are words, not entities.

    Args:
        names: names of the entities by row.
        degree: int [N] number of facts by row.
        aliases: pairs of another name and a row.
        min_length: width that a name needs after folding, in characters. Wide ones count twice.
        max_mentions: the longest so many of a text are kept. 0 keeps all.
        stop_words: names that are never taken.

    Attributes:
        stop_words: names that are never taken, sorted. `learn_stop_words` adds to them.
    """

    def __init__(
        self,
        names: Names,
        degree: np.ndarray,
        *,
        aliases: Iterable[tuple[str, int]] = (),
        min_length: int = 3,
        max_mentions: int = 0,
        stop_words: Iterable[str] = (),
    ) -> None:
        self._names = names
        self.max_mentions = max_mentions
        self.stop_words = tuple(sorted(set(stop_words)))
        patterns, twins = _patterns(enumerate(_each(names)), degree, min_length)
        others, _ = _patterns(((row, alias) for alias, row in aliases), degree, min_length)
        for pattern, row in others.items():
            patterns.setdefault(pattern, row)
        self._rows = np.fromiter(patterns.values(), dtype=np.int32, count=len(patterns))
        self._twins = {patterns[pattern]: tuple(rows) for pattern, rows in twins.items()}
        # A DFA would take several times the memory and finds little faster.
        self._automaton = AhoCorasick(
            patterns,
            matchkind=MatchKind.LeftmostLongest,
            implementation=Implementation.ContiguousNFA,
            store_patterns=False,
        )

    @classmethod
    def of_graph(
        cls, graph: Graph, *, alias_file: str | Path | None = None, **options: Any
    ) -> EntityLinker:
        """Returns the linker of a graph.

        Args:
            graph: its entities are found.
            alias_file: lines of an alias, a tab and an entity, plain or gzip.
            options: as for the class.

        Raises:
            DataError: lines of the alias file cannot be used.
            MissingInputError: the alias file cannot be read.
        """
        aliases = read_aliases(alias_file, graph.entities) if alias_file is not None else ()
        return cls(graph.entities, graph.degree(), aliases=aliases, **options)

    def link(self, text: str) -> tuple[Mention, ...]:
        """Returns the mentions of a text in its order."""
        mentions = [m for m in self._mentions(text) if m.name not in self.stop_words]
        # Every sentence begins with a capital.
        if any(
            _has_capital(m.name) and _has_capital(text[max(m.start, 1) : m.end]) for m in mentions
        ):
            mentions = [
                m
                for m in mentions
                if not _has_capital(m.name) or _has_capital(text[m.start : m.end])
            ]
        if 0 < self.max_mentions < len(mentions):
            longest = sorted(mentions, key=lambda m: (m.start - m.end, m.start))
            mentions = sorted(longest[: self.max_mentions])
        return tuple(mentions)

    def _mentions(self, text: str) -> Iterator[Mention]:
        folded, text_places = fold_with_places(text)
        marked, folded_places = mark_edges_with_places(folded.replace(EDGE, " "))
        for index, start, end in self._automaton.find_matches_as_indexes(marked):
            row = int(self._rows[index])
            # The place after the last character, past the others that it was folded with.
            final = folded_places[end - 1 - (marked[end - 1] == EDGE)]
            last = text_places[final]
            stop = next(place for place in text_places[final:] if place > last)
            begin = text_places[folded_places[start]]
            spelled = (
                twin for twin in self._twins.get(row, ()) if self._names[twin] == text[begin:stop]
            )
            row = next(spelled, row)
            yield Mention(begin, stop, row, self._names[row])

    def learn_stop_words(self, texts: Iterable[str], share: float = 0.01) -> tuple[str, ...]:
        """Adds the names that stand in so many texts that they are words, not topics: "Film".

        Args:
            texts: questions. Their topics need not be known.
            share: of the texts, and 3 texts at least.

        Returns:
            The names added, the most frequent first.
        """
        counts: Counter[str] = Counter()
        number = 0
        for text in texts:
            number += 1
            counts.update({mention.name for mention in self._mentions(text)})
        least = max(3, share * number)
        frequent = [name for name, count in counts.items() if count >= least]
        added = sorted(set(frequent) - set(self.stop_words), key=lambda n: (-counts[n], n))
        self.stop_words = tuple(sorted({*self.stop_words, *added}))
        return tuple(added)


def _each(names: Names) -> Iterator[str]:
    return (names[row] for row in range(len(names)))


def _patterns(
    named: Iterable[tuple[int, str]], degree: np.ndarray, min_length: int
) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Returns the row of each folded name with its edges marked, and all rows where it has several.

    The row is that of the highest degree, then the first.
    """
    found: dict[str, int] = {}
    twins: dict[str, list[int]] = {}
    for row, name in named:
        folded = fold(name)
        if width(folded) < min_length or not any(map(str.isalnum, folded)):
            continue
        pattern = mark_edges(folded)
        known = found.setdefault(pattern, row)
        if known != row:
            twins.setdefault(pattern, [known]).append(row)
    for pattern, rows in twins.items():
        found[pattern] = min(rows, key=lambda row: (-degree[row], row))
    return found, twins


def _has_capital(text: str) -> bool:
    return any(map(str.isupper, text))


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
