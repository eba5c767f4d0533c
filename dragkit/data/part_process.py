"""Packs parts in a process of its own: the program, and the handle that its parent has."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import dragkit
import dragkit_kernels
from dragkit.data.lines import Block
from dragkit.data.parts import PackingJob, RelationRows, pack_part
from dragkit.errors import DragkitError


class _Message(NamedTuple):
    """A JSON value, and bytes that belong to it."""

    value: object
    data: bytes


def _send(stream: BinaryIO, value: object, data: bytes = b"") -> None:
    stream.write(json.dumps([value, len(data)]).encode() + b"\n")
    stream.write(data)
    stream.flush()


def _receive(stream: BinaryIO) -> _Message | None:
    """Reads a message, or None where the other side has ended."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    value, size = json.loads(line)
    data = stream.read(size)
    return _Message(value, data) if len(data) == size else None


class PartProcess:
    """A process that packs one part at a time. Any thread may wait for it.

    It does not import the main module and holds no file of its parent. So it needs no guard in a
    user's script, and no lock of its parent outlives this. It ends when the parent does.
    """

    def __init__(self, job: PackingJob) -> None:
        self._job = job
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dragkit.data.part_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
        )

    def pack(
        self, block: Block, ids: dict[str, int], relation_rows: RelationRows, *, check_only: bool
    ) -> dict:
        """See `pack_part`.

        Raises:
            OSError: the part cannot be written.
            DragkitError: the process ended.
        """
        task = [self._job, block.number, block.first_line, ids, check_only]
        self._write(task, block.data)
        self._write(list(relation_rows(self._read())))
        return self._read()

    def _write(self, value: object, data: bytes = b"") -> None:
        try:
            _send(self._process.stdin, value, data)
        except BrokenPipeError:
            raise self._ended() from None

    def _read(self) -> object:
        message = _receive(self._process.stdout)
        if message is None:
            raise self._ended()
        if isinstance(message.value, dict) and "os_error" in message.value:
            raise OSError(*message.value["os_error"])
        return message.value

    def _ended(self) -> DragkitError:
        code = self._process.wait()
        return DragkitError(
            f"a process that packs questions ended with exit code {code}. Its own message is "
            "above. Code -9 without one mostly means that the memory is full."
        )

    def kill(self) -> None:
        """Ends the process and waits for its end."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            # Bytes that the process did not take are not missed.
            with suppress(BrokenPipeError):
                stream.close()


def _environment() -> dict[str, str]:
    """The environment of a process that imports the same packages and uses one core."""
    roots = {str(Path(package.__file__).parents[1]) for package in (dragkit, dragkit_kernels)}
    # Installed packages are found without help.
    roots -= set(sysconfig.get_paths().values())
    paths = [*sorted(roots), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def _listen(messages: queue.SimpleQueue[_Message]) -> None:
    """Passes messages on. Ends the process as soon as its parent has ended."""
    while (message := _receive(sys.stdin.buffer)) is not None:
        messages.put(message)
    os._exit(1)


def main() -> None:
    """Packs the parts that the parent sends, until it ends this process."""
    # The parent decides what a signal to both means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # What a library prints is no answer.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    messages: queue.SimpleQueue[_Message] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(messages,), daemon=True).start()

    def relation_rows(names: Sequence[str]) -> Sequence[int]:
        _send(answers, list(names))
        return messages.get().value

    while True:
        (job, number, first_line, ids, check_only), data = messages.get()
        block = Block(number, first_line, data, 0)
        try:
            meta = pack_part(PackingJob(*job), block, ids, relation_rows, check_only=check_only)
        except OSError as error:
            _send(answers, {"os_error": [error.errno, error.strerror, error.filename]})
        else:
            _send(answers, meta)


if __name__ == "__main__":
    main()
