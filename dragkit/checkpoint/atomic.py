"""File operations that wait for the disk, so that a crash at any instant loses nothing."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path


def write_durably(path: Path, data: bytes) -> str:
    """Writes a new file and fsyncs it.

    Args:
        path: the file, which must not exist yet.
        data: the whole content.

    Returns:
        SHA-256 of `data` in lower-case hexadecimal. It is not read back, so a fault of the disk is
        found at the next verification.

    Raises:
        OSError: the write failed. A part of the file may remain.
    """
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def fsync_path(path: Path) -> None:
    """Fsyncs a file that another library wrote, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse to fsync a folder. Then nothing more can be done.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def make_dirs(path: Path) -> None:
    """Makes a folder and its missing parents, and fsyncs each parent."""
    if not path.is_dir():
        make_dirs(path.parent)
        path.mkdir(exist_ok=True)
        fsync_path(path.parent)


def write_text_atomically(path: Path, text: str) -> None:
    """Replaces a text file atomically: a reader sees the whole old or the whole new text."""
    temp = path.with_name(f"{path.name}.tmp")
    temp.unlink(missing_ok=True)
    try:
        write_durably(temp, text.encode())
        os.replace(temp, path)
    except OSError:
        temp.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)
