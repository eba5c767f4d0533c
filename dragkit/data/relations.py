"""Relation names, their rows, and the words that the text encoder reads for them."""

from __future__ import annotations

import re
from collections.abc import Iterable

# A dotted schema name, `people.person.place_of_birth`. Sentences, abbreviations, versions and dates
# are none: they hold a space, a part of one capital letter, or a dot between two digits.
_PART = r"(?![A-Z](?:\.|$))\w[\w:-]*"
_SCHEMA_NAME = re.compile(rf"(?!\d)(?!.*\d\.\d){_PART}(?:\.{_PART})+")
_IRI = re.compile(r"<?(?:[a-z][a-z0-9+.-]*://|urn:)\S*", re.IGNORECASE)
# A mark in front of a relation that is read from tail to head. Cutting the name would drop it.
_MARK = re.compile(
    r"[\^~] ?(?=\S)|((?:inv|inverse|rev|reverse|reversed)(?:[ _]of)?)[ _:./-]+(?=\S)", re.IGNORECASE
)
_MARK_BEHIND = "^-1"


def relation_text(name: str) -> str:
    """Returns the words of a relation's name, split at underscores and spaces.

    A dotted schema name gives its last two parts, `country capital` for `geo.country.capital`, and
    an IRI its last part. Any other name keeps all its words, dots included. A mark of inversion
    (`^`, `~`, `inv:` or `reverse_` in front, `^-1` behind) becomes a word in front.

    The text is a function of the name alone. If names that share one got more parts, a question's
    scores would depend on the other rows of its file, and a test file would read a relation in
    other words than the training file. Names that share a text are counted in the log instead.
    """
    name, marks, start = " ".join(name.split()), [], 0
    if name.endswith(_MARK_BEHIND) and len(name) > len(_MARK_BEHIND):
        name, marks = name.removesuffix(_MARK_BEHIND).rstrip(), ["inverse"]
    while mark := _MARK.match(name, start):
        marks.append(mark[1] or "inverse")
        start = mark.end()
    name = name[start:]
    if _IRI.fullmatch(name):
        # The last part of an IRI may be a schema name, as in Freebase's own dumps.
        last = re.split(r"[/#]", name.strip("<>").rstrip("/#"))[-1]
        name = last.rpartition(":")[2] or last or name
    if _SCHEMA_NAME.fullmatch(name):
        name = " ".join(name.split(".")[-2:])
    return " ".join(" ".join([*marks, name]).replace("_", " ").split())


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

    def texts(self) -> list[str]:
        """Returns the texts of all relations: 2r is the forward one of relation r, 2r+1 inverse."""
        return [
            text for row in range(len(self)) for text in (self.text(row), self.inverse_text(row))
        ]
