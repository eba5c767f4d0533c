"""What a toy's process runs in: a slow or failing disk, limits, variables, a log nobody reads."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from dragkit.checkpoint import checkpoint


@contextmanager
def slow_disk(seconds: float) -> Iterator[None]:
    """Each fsync takes longer by `seconds`, so that more faults hit a save."""
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(seconds)
        fsync(descriptor)

    with mock.patch.object(os, "fsync", slow):
        yield


@contextmanager
def failing_disk(code: int, at: int, times: int) -> Iterator[None]:
    """The files of checkpoints cannot be written from number `at` on, `times` times.

    A save ends at its first file that cannot be written. So these are saves in a row.
    """
    write, calls = checkpoint.write_durably, iter(range(10**9))

    def fail(path: Path, data: bytes) -> str:
        if at <= next(calls) < at + times:
            raise OSError(code, os.strerror(code), str(path))
        return write(path, data)

    with mock.patch.object(checkpoint, "write_durably", fail):
        yield


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    yield


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Sets variables of the environment."""
    with mock.patch.dict(os.environ, values):
        yield


@contextmanager
def closed_log(descriptors: tuple[int, ...]) -> Iterator[None]:
    """The reader of these descriptors, 1 or 2, has ended."""
    reading, writing = os.pipe()
    for descriptor in descriptors:
        os.dup2(writing, descriptor)
    os.close(reading)
    os.close(writing)
    yield
