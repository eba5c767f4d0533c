"""The first stop signal is a request, the second one an order."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dragkit.trainer.signals import StopSignal

# The module is loaded from its file: importing the package would load torch, and cost seconds.
LOOP = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("signals", sys.argv[1])
signals = importlib.util.module_from_spec(spec)
spec.loader.exec_module(signals)
with signals.StopSignal() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("requested", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def handlers() -> Iterator[list[int]]:
    """Handlers of our own under the ones tested; the list gets every signal that reaches them."""
    seen: list[int] = []
    before = {
        number: signal.signal(number, lambda got, _: seen.append(got))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_first_is_noted_and_the_second_goes_to_whoever_had_it_before(
    handlers: list[int], first: int, second: int
) -> None:
    for _ in range(2):  # one after another starts without a request
        with StopSignal() as stop:
            assert not stop.requested
            os.kill(os.getpid(), first)
            assert stop.requested and handlers == []
            os.kill(os.getpid(), second)
            assert stop.requested
        assert handlers == [second]
        handlers.clear()


def test_handlers_come_back_at_the_end_and_after_an_error(handlers: list[int]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    with pytest.raises(ValueError, match="inside"), StopSignal():
        raise ValueError("inside")
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_outside_the_main_thread_the_signals_stay_with_the_program(handlers: list[int]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    found: list[object] = []

    def work() -> None:
        with StopSignal() as stop:
            found.extend([signal.getsignal(signal.SIGTERM), stop.requested])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before, False]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(second: int) -> None:
    file = importlib.util.find_spec("dragkit").submodule_search_locations[0]
    child = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(Path(file) / "trainer" / "signals.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background job starts with SIGINT ignored; the child is to be like one on a terminal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        assert child.stdout.readline() == "requested\n"
        assert child.poll() is None
        child.send_signal(second)
        _, errors = child.communicate(timeout=20)
    finally:
        child.kill()
        child.wait()
    # Python leaves by the signal itself where nothing has caught it.
    assert child.returncode == -second
    assert "SIGTERM" in errors, "the first signal says that one more ends it at once"
