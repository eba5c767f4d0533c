"""A stop signal becomes a flag that the loop looks at; a second one ends the process at once."""

from __future__ import annotations

import logging
import signal
from types import FrameType

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Context manager; `requested` turns True at the first SIGINT, SIGTERM or SIGUSR1."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for number in _SIGNALS:
            if signal.getsignal(number) is signal.SIG_IGN:
                continue  # a background job: whoever started it does not want it interrupted
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: the embedding program owns the signals
                break
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        logger.warning(
            "%s: saving after this step; once more to stop at once", signal.Signals(number).name
        )
        self.requested = True
        self._restore()
