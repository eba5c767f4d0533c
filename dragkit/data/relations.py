"""Relation strings, their rows, and the words an encoder reads for them."""

from __future__ import annotations

from collections.abc import Iterable


def relation_text(name: str) -> str:
    """The words of the last two dotted parts: `location.country.capital` -> `country capital`."""
    return " ".join(" ".join(name.split(".")[-2:]).replace("_", " ").split())


class RelationVocab:
    """Relations in order of their first appearance.

    Args:
        names: relations to begin with; repeated ones count once.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._rows: dict[str, int] = {}
        self._names: list[str] = []
        for name in names:
            self.add(name)

    def add(self, name: str) -> int:
        """The row of a relation, a new one where it has none."""
        row = self._rows.get(name)
        if row is None:
            row = self._rows[name] = len(self._names)
            self._names.append(name)
        return row

    @property
    def names(self) -> tuple[str, ...]:
        """All relations, by row."""
        return tuple(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def text(self, row: int) -> str:
        """Words of a relation read from head to tail."""
        return relation_text(self._names[row])

    def inverse_text(self, row: int) -> str:
        """The same words in reversed order, for the direction from tail to head."""
        return " ".join(reversed(self.text(row).split()))
