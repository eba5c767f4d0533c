"""One writer per run: a live owner is respected, a dead one replaced."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from dragkit.errors import WriteError
from dragkit.trainer import lock
from dragkit.trainer.checkpoint import RunLock, Snapshot, TrainState, find_checkpoint
from dragkit.trainer.checkpoint import save_checkpoint as save

DEAD_PID = 99_999_999


def in_child(action: Callable[[], object]) -> int:
    """Fork, run `action` in the child and let it wait; returns its pid once `action` is done."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os.write(writer, b"+")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as file:
        assert file.read(1) == b"+"
    return pid


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def test_a_live_owner_is_named_and_a_killed_one_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "runs" / "one"
    pid = in_child(RunLock(root).__enter__)
    try:
        with pytest.raises(WriteError) as caught, RunLock(root):
            pass
        assert caught.value.exit_code == 73
        for part in (str(pid), socket.gethostname(), str(root)):
            assert part in str(caught.value)
        assert lock.read_lock_owner(root) == (pid, socket.gethostname())
    finally:
        end(pid)
    with RunLock(root):
        assert lock.read_lock_owner(root) == (os.getpid(), socket.gethostname())
        assert str(pid) in caplog.text
    assert lock.read_lock_owner(root) is None


def test_a_process_cannot_enter_twice_but_can_enter_again(tmp_path: Path) -> None:
    for _ in range(2):
        with RunLock(tmp_path):
            with pytest.raises(lock.RunInUseError, match=str(os.getpid())), RunLock(tmp_path):
                pass
            assert lock.is_locked_here(tmp_path / "checkpoints")
        assert not lock.is_locked_here(tmp_path)


def test_the_lock_is_freed_when_the_block_breaks(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), RunLock(tmp_path):
        raise RuntimeError
    with RunLock(tmp_path):
        pass


def test_a_worker_that_outlives_the_owner_holds_nothing(tmp_path: Path) -> None:
    with RunLock(tmp_path) as held:
        pid = in_child(lambda: None)
        try:
            # A child that leaves the block does not free its parent's lock.
            end(in_child(lambda: held.__exit__(None, None, None)))
            owner = f"process {os.getpid()} "
            with pytest.raises(lock.RunInUseError, match=owner), RunLock(tmp_path):
                pass
            held.__exit__(None, None, None)
            with RunLock(tmp_path):
                pass
        finally:
            end(pid)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x", "host": 1}', "9" * 9999])
def test_an_illegible_lock_file_does_not_block(tmp_path: Path, text: str) -> None:
    (tmp_path / lock.LOCK_NAME).write_text(text)
    with RunLock(tmp_path):
        assert lock.read_lock_owner(tmp_path) == (os.getpid(), socket.gethostname())


@pytest.mark.parametrize(
    ("pid", "host", "free"),
    [
        (DEAD_PID, socket.gethostname(), True),
        (os.getppid(), socket.gethostname(), False),
        (DEAD_PID, "elsewhere", False),
    ],
)
def test_without_kernel_locks_the_named_owner_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pid: int, host: str, free: bool
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / lock.LOCK_NAME).write_text(json.dumps({"pid": pid, "host": host}))
    if free:
        with RunLock(tmp_path):
            pass
    else:
        with pytest.raises(lock.RunInUseError, match=host), RunLock(tmp_path):
            pass


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteError, match="cannot be locked") as caught, RunLock(tmp_path / "file"):
        pass
    assert caught.value.exit_code == 74


def test_temporaries_of_a_writer_on_another_machine_stay(tmp_path: Path) -> None:
    save(tmp_path, 1, Snapshot(), TrainState("joint", 0, 1, 0, 0))
    temp = tmp_path / f"step-00000002.tmp-{DEAD_PID}"
    temp.mkdir()
    (tmp_path / lock.LOCK_NAME).write_text(json.dumps({"pid": DEAD_PID, "host": "elsewhere"}))
    find_checkpoint(tmp_path)
    assert temp.exists()
    with RunLock(tmp_path):
        # The owner of the lock knows that nobody else writes, whatever the numbers say.
        (tmp_path / f"step-00000003.tmp-{os.getppid()}").mkdir()
        find_checkpoint(tmp_path)
    assert set(os.listdir(tmp_path)) == {"step-00000001", "latest", lock.LOCK_NAME}
