"""Stop signals: the first one stops the command in good order, a second one ends the process."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dragkit.errors import Interrupted, Stopped

logger = logging.getLogger(__name__)

# Slurm sends SIGUSR1 before a time limit if it is asked to (--signal=USR1@...).
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """A context manager that handles the first SIGINT, SIGTERM or SIGUSR1.

    The signal raises `Stopped` at once, which unwinds whatever runs: loading, packing, evaluating.
    Inside a block of `deferred` nothing is raised, and the block reads `requested`.

    Attributes:
        requested: whether a signal has come.
        raises: whether a signal outside of `deferred` raises. Several ranks set it to False,
            because a rank that leaves alone would keep the others waiting.
    """

    def __init__(self) -> None:
        self.requested = False
        self.raises = True
        self._deferred = False
        self._raised: str | None = None
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

    @contextmanager
    def deferred(self, defer: bool = True) -> Iterator[None]:
        """In this block a signal only sets `requested`, or raises again where `defer` is False."""
        before, self._deferred = self._deferred, defer
        try:
            yield
        finally:
            self._deferred = before

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Raises `Stopped` again where a library has turned it into an error of its own."""
        try:
            yield
        except Exception as error:
            if self._raised is None or isinstance(error, Interrupted):
                raise
            raise Stopped(self._raised) from error

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self.requested = True
        self._restore()
        if self.raises and not self._deferred:
            self._raised = name
            raise Stopped(name)
        logger.warning("%s: saving after this step. Send it again to stop at once.", name)
