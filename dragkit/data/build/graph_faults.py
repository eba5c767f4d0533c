"""Faults of graph files, listed together."""

from __future__ import annotations

from pathlib import Path

from dragkit.errors import DataError

_MAX_LISTED = 100


class GraphFaults:
    """Faults of all files, in order. The first hundred are kept, the others are counted."""

    def __init__(self) -> None:
        self.count = 0
        self._listed: list[str] = []

    def add(self, path: Path, line: int | None, part: str, reason: str) -> None:
        """Notes a fault. `part` is what is wrong: a column, or the line."""
        self.count += 1
        if len(self._listed) < _MAX_LISTED:
            place = path if line is None else f"{path}:{line}"
            self._listed.append(f"{place}: {part}: {reason}")

    def check(self) -> None:
        """Raises if there is any.

        Raises:
            DataError: it lists the faults and says how many more there are.
        """
        if not self.count:
            return
        more = self.count - len(self._listed)
        listed = [*self._listed, *([f"... and {more} more."] if more else [])]
        raise DataError("\n".join([*listed, f"{self.count} lines of the graph cannot be used."]))
