"""Stop signals: the first one stops the command in good order, a second one ends the process."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dragkit.console import STOP_SIGNALS
from dragkit.errors import Interrupted, Stopped

logger = logging.getLogger(__name__)


class StopSignal:
    """A context manager that handles the first SIGINT, SIGTERM, SIGUSR1 or SIGHUP.

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
        self._name = ""
        self._deferred = False
        self._raised: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for number in STOP_SIGNALS:
            # A shell starts background jobs with SIGINT ignored, and nohup ignores SIGHUP. They
            # keep ignoring it.
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

    def check(self) -> None:
        """Raises `Stopped` if a signal has come, such as in a block of `deferred`."""
        if self.requested:
            self._raised = self._name
            raise Stopped(self._name)

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
        # A signal may come in the midst of this, and its handler comes here, too.
        previous, self._previous = self._previous, {}
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            # The second signal came before the handlers were restored.
            if number != signal.SIGHUP:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self._name, self.requested = signal.Signals(number).name, True
        self._restore()
        if number == signal.SIGHUP:
            # The kernel and the shell both send it. Nobody sends it twice to stop at once.
            self._previous[number] = signal.signal(number, signal.SIG_IGN)
        if self.raises and not self._deferred:
            self.check()
        logger.warning("%s: stopping after this step. Send it again to stop at once.", self._name)
