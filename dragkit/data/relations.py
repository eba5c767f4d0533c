"""Relation names, their rows, and the words that the text encoder reads for them."""

from __future__ import annotations

from collections.abc import Iterable


def relation_text(name: str) -> str:
    """Returns the words of the last two dotted parts, `country capital` for `a.country.capital`."""
    return " ".join(" ".join(name.split(".")[-2:]).replace("_", " ").split())


class RelationVocab:
    """Relations in the order of their first occurrence.

    Args:
        names: initial relations. Repeated ones count once.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._rows: dict[str, int] = {}
        self._names: list[str] = []
        for name in names:
            self.add(name)

    def add(self, name: str) -> int:
        """Returns the row of a relation, which is new for an unknown one."""
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
        """Returns the words of a relation, read from head to tail."""
        return relation_text(self._names[row])

    def inverse_text(self, row: int) -> str:
        """Returns the same words in reverse order, for the direction from tail to head."""
        return " ".join(reversed(self.text(row).split()))
