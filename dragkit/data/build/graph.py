"""A knowledge graph as sorted arrays: the facts of every head and of every tail."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dragkit.data.question_row import Triple


class Names(Protocol):
    """Distinct names in ascending order. A list of strings is one, and so are mapped `Strings`."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> str: ...


def find_name(names: Names, name: str) -> int | None:
    """Returns the row of a name, None if it is not there."""
    row = bisect_left(names, name)  # type: ignore[type-var, arg-type]
    return row if row < len(names) and names[row] == name else None


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """N entities, R relations and E distinct facts, sorted by (head, relation, tail).

    Rows follow the order of the names, so two graphs of the same facts are equal. The arrays may be
    mapped from files.

    Attributes:
        entities, relations: names by row.
        head, relation, tail: int32 [E] rows of each fact.
        head_ptr: int64 [N+1]. The facts of head n are head_ptr[n] to head_ptr[n+1].
        tail_order: int32 [E] facts sorted by (tail, fact).
        tail_ptr: int64 [N+1]. The facts of tail n are tail_order[tail_ptr[n]:tail_ptr[n+1]].
        folder: cache folder from which the arrays are mapped, None for a graph in memory.
    """

    entities: Names
    relations: Names
    head: np.ndarray
    relation: np.ndarray
    tail: np.ndarray
    head_ptr: np.ndarray
    tail_order: np.ndarray
    tail_ptr: np.ndarray
    folder: Path | None = None

    @classmethod
    def from_triples(cls, triples: Iterable[Triple]) -> Graph:
        """Builds a small graph in memory. Repeated triples count once."""
        facts = sorted(set(triples))
        entities = sorted({name for head, _, tail in facts for name in (head, tail)})
        relations = sorted({relation for _, relation, _ in facts})
        row_of = {name: row for row, name in enumerate(entities)}
        relation_of = {name: row for row, name in enumerate(relations)}
        rows = [(row_of[h], relation_of[r], row_of[t]) for h, r, t in facts]
        head, relation, tail = np.array(rows, dtype=np.int32).reshape(-1, 3).T.copy()
        return cls.from_arrays(entities, relations, head, relation, tail)

    @classmethod
    def from_arrays(
        cls,
        entities: Names,
        relations: Names,
        head: np.ndarray,
        relation: np.ndarray,
        tail: np.ndarray,
    ) -> Graph:
        """Indexes distinct facts that are sorted by (head, relation, tail)."""

        def starts(rows: np.ndarray) -> np.ndarray:
            return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(entities)))])

        tail_order = np.argsort(tail, kind="stable").astype(np.int32)
        return cls(
            entities, relations, head, relation, tail, starts(head), tail_order, starts(tail)
        )

    @property
    def num_entities(self) -> int:
        """N."""
        return len(self.entities)

    @property
    def num_facts(self) -> int:
        """E."""
        return len(self.head)

    def degree(self) -> np.ndarray:
        """Returns int64 [N] the number of facts at each entity. A loop counts twice."""
        return np.diff(self.head_ptr) + np.diff(self.tail_ptr)

    def triples(self, facts: np.ndarray | Sequence[int]) -> list[Triple]:
        """Returns facts in names."""
        rows = np.asarray(facts, dtype=np.int64)
        columns = (self.head[rows], self.relation[rows], self.tail[rows])
        names = (self.entities, self.relations, self.entities)
        texts = []
        for column, source in zip(columns, names, strict=True):
            distinct, position = np.unique(column, return_inverse=True)
            found = [source[row] for row in distinct.tolist()]
            texts.append([found[row] for row in position.tolist()])
        return list(zip(*texts, strict=True))
