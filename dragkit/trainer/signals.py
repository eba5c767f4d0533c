"""The first stop signal sets a flag that the loop reads. A second one ends the process."""

from __future__ import annotations

import logging
import signal
from types import FrameType

logger = logging.getLogger(__name__)

# Slurm sends SIGUSR1 before a time limit if it is asked to (--signal=USR1@...).
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """A context manager whose `requested` becomes True at the first SIGINT, SIGTERM or SIGUSR1."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for number in _SIGNALS:
            # A shell starts background jobs with SIGINT ignored. They keep ignoring it.
            if signal.getsignal(number) is signal.SIG_IGN:
                continue
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:
                # Python sets handlers in the main thread alone. The host program keeps its own.
                break
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        logger.warning(
            "%s: saving after this step. Send it again to stop at once.",
            signal.Signals(number).name,
        )
        self.requested = True
        self._restore()
