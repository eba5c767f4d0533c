"""What a check found: how many cases it tried, and which of them lost something."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


class Loss(Exception):
    """Something was lost, or a fault went unnoticed. The message says what."""


def require(holds: object, message: str) -> None:
    """Raises Loss unless `holds`."""
    if not holds:
        raise Loss(message)


@dataclass(slots=True)
class Outcome:
    """The result of one check.

    Attributes:
        name: the check, such as "kills survived".
        tried: number of cases.
        losses: one line per case in which something was lost.
        notes: facts for the page.
        seconds: duration.
    """

    name: str
    tried: int = 0
    losses: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def held(self) -> int:
        """Number of cases without a loss."""
        return max(self.tried - len(self.losses), 0)

    @contextmanager
    def case(self, name: str, *, tries: int = 1) -> Iterator[None]:
        """Counts `tries` cases. A Loss, or any other exception, becomes a line of `losses`."""
        self.tried += tries
        try:
            yield
        except Loss as loss:
            self.losses.append(f"{name}: {loss}")
        except Exception as error:
            # The other cases are still worth trying, and the page shows this one.
            self.losses.append(f"{name}: {type(error).__name__}: {error}")
