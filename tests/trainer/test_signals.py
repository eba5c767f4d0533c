"""The first stop signal asks the loop to stop or raises, the second one ends the process."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dragkit.console import STOP_SIGNALS
from dragkit.errors import Stopped
from dragkit.selftest.toy import as_on_a_terminal
from dragkit.trainer.question_dataset import _delayed_signals, _ignore_signals
from dragkit.trainer.signals import StopSignal

# The module is loaded from its file, because importing the package loads torch for seconds.
LOOP = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("signals", sys.argv[1])
signals = importlib.util.module_from_spec(spec)
spec.loader.exec_module(signals)
with signals.StopSignal() as stop, stop.deferred():
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("requested", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def handlers() -> Iterator[list[int]]:
    """Installs handlers below the tested ones and yields the signals that reach them."""
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    yield received
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_first_sets_the_flag_and_the_second_reaches_the_previous_handler(
    handlers: list[int], first: int, second: int
) -> None:
    for _ in range(2):  # each context starts without a request
        with StopSignal() as stop, stop.deferred():
            assert not stop.requested
            os.kill(os.getpid(), first)
            assert stop.requested and handlers == []
            os.kill(os.getpid(), second)
            assert stop.requested
        assert handlers == [second]
        handlers.clear()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_outside_of_a_deferring_block_the_first_raises(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A background job of a shell starts with SIGINT ignored, and so would these tests.
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    with StopSignal() as stop, stop.deferred():
        with pytest.raises(Stopped, match=signal.Signals(number).name), stop.deferred(False):
            os.kill(os.getpid(), number)
        assert stop.requested
    with StopSignal() as stop:
        with stop.deferred():
            pass
        with pytest.raises(Stopped):
            os.kill(os.getpid(), number)


def test_a_library_may_turn_the_stop_into_its_own_error() -> None:
    with StopSignal() as stop, pytest.raises(Stopped, match="SIGTERM"), stop.translated():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise RuntimeError("cannot import name") from error
    with StopSignal() as stop, pytest.raises(ValueError, match="own"), stop.translated():
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
        # A fault after a signal that did not raise is a fault.
        raise ValueError("own")


def test_a_signal_that_was_put_off_is_raised_later() -> None:
    with StopSignal() as stop:
        stop.check()
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"):
            stop.check()


def test_a_terminal_that_is_closed_stops_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel and the shell both send SIGHUP, which is no second signal."""
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    received: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, _: received.append(number))
    try:
        with StopSignal() as stop, stop.deferred():
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested and not received
        os.kill(os.getpid(), signal.SIGHUP)
        assert received == [signal.SIGHUP]
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_while_the_first_is_handled(
    second: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with StopSignal() as stop, stop.deferred():
        set_handler, nested = signal.signal, []

        def interrupted(number: int, handler: object) -> object:
            if not nested:
                nested.append(number)
                stop._handle(second, None)
            return set_handler(number, handler)

        monkeypatch.setattr(signal, "signal", interrupted)
        stop._handle(signal.SIGTERM, None)
        monkeypatch.setattr(signal, "signal", set_handler)
        assert nested and stop.requested
        # As where the handlers were restored already. Only SIGHUP comes twice on its own.
        assert ended == ([] if second == signal.SIGHUP else [second])
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_while_workers_start_comes_after_them() -> None:
    done = []
    with StopSignal() as stop:
        with pytest.raises(Stopped), _delayed_signals():
            for number in (signal.SIGTERM, signal.SIGHUP):
                # To the process, of which another thread may receive it.
                os.kill(os.getpid(), number)
                ThreadPoolExecutor(1).submit(time.sleep, 0.01).result()
            assert not stop.requested
            done.append(True)
        assert done == [True] and stop.requested


def test_a_worker_ignores_every_stop_signal() -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        _ignore_signals(0)
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_handled(process: subprocess.Popen) -> bool:
    """Whether a process handles SIGTERM by now."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = status.partition("SigCgt:")[2].split()[0]
    return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("named", [True, False])
def test_a_signal_during_the_first_imports(tmp_path: Path, number: int, named: bool) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "dragkit.train", "--phase", "1", "--preset", "tiny"]
    command += ["--checkpoint_dir", str(tmp_path / "run")] if named else []
    path = os.pathsep.join([str(root), str(root / "kernels")])
    child = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": path},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=as_on_a_terminal,
    )
    try:
        while not _is_handled(child):
            assert child.poll() is None
        child.send_signal(number)
        errors = child.communicate(timeout=60)[1]
    finally:
        child.kill()
        child.wait()
    # Without a named folder --resume would mean another run.
    assert child.returncode == (75 if named else 130), errors
    assert "Traceback" not in errors and signal.Signals(number).name in errors
    assert ("--resume" in errors) == named
    assert not any(tmp_path.rglob("step-*"))


def test_a_rank_of_several_never_raises() -> None:
    with StopSignal() as stop:
        stop.raises = False
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


def test_handlers_are_restored_at_the_end_and_after_an_error(handlers: list[int]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    with pytest.raises(ValueError, match="inside"), StopSignal():
        raise ValueError("inside")
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_outside_of_the_main_thread_handlers_stay(handlers: list[int]) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def work() -> tuple[object, bool]:
        with StopSignal() as stop:
            return signal.getsignal(signal.SIGTERM), stop.requested

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == (before, False)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(second: int) -> None:
    file = importlib.util.find_spec("dragkit").submodule_search_locations[0]
    child = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(Path(file) / "trainer" / "signals.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=as_on_a_terminal,
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
    # Python ends by the signal itself where no handler catches it.
    assert child.returncode == -second
    assert "SIGTERM" in errors, "the first signal logs what a second one does"
