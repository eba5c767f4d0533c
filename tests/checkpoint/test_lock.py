"""A run has one writer: the lock excludes live processes and ends with its owner."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from dragkit.checkpoint.checkpoint import RunInUseError, RunLock
from dragkit.errors import CreateError

_held: list[RunLock] = []
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def in_child(action: Callable[[], object]) -> int:
    """Runs `action` in a forked child, which then waits; returns the pid after the action."""
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


def hold(root: Path) -> None:
    """Locks until this process ends."""
    held = RunLock(root)
    held.__enter__()
    _held.append(held)


def assert_in_use(root: Path) -> None:
    with pytest.raises(RunInUseError, match="another process") as caught, RunLock(root):
        pass
    assert caught.value.exit_code == 73 and str(root) in str(caught.value)


def test_the_lock_ends_with_its_owner(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "one"
    pid = in_child(lambda: hold(root))
    try:
        assert_in_use(root)
        (tmp_path / "link").symlink_to(root)
        assert_in_use(tmp_path / "link")
    finally:
        end(pid)
    with RunLock(tmp_path / "link"):
        pass


def test_a_process_can_lock_again_after_the_block_or_its_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunLock(tmp_path):
        raise KeyError
    (tmp_path / "run.lock").write_text('{"pid": 1, "host": "an earlier one"}')
    with RunLock(tmp_path):
        end(in_child(lambda: assert_in_use(tmp_path)))


def test_a_forked_worker_does_not_hold_the_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path) as held:
        pid = in_child(lambda: None)
        try:
            # A child that leaves the block does not release its parent's lock.
            end(in_child(lambda: held.__exit__(None, None, None)))
            end(in_child(lambda: assert_in_use(tmp_path)))
            held.__exit__(None, None, None)
            end(in_child(lambda: hold(tmp_path)))
        finally:
            end(pid)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    for folder in ("file", "file/below", "dangling"):
        with pytest.raises(CreateError, match=f"{folder}: the run cannot be locked") as caught:
            RunLock(tmp_path / folder).__enter__()
        assert caught.value.exit_code == 73
