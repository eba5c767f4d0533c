"""Durable file operations: what a checkpoint needs so that a crash at any instant loses nothing."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path


def write_durably(path: Path, data: bytes) -> str:
    """Writes a new file and waits until it has reached the disk.

    Args:
        path: a name that does not exist yet; data: the whole content.

    Returns:
        SHA-256 of the content in lower-case hexadecimal. It is taken from memory and not read back,
        so that a fault of the disk shows at the next verification.

    Raises:
        OSError: from the system; a part of the file may be left.
    """
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def fsync_path(path: Path) -> None:
    """Waits until a file that another library wrote, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no fsync for folders; there is nothing further to wait for.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def make_dirs(path: Path) -> None:
    """Makes a folder and its missing parents, each durable before the next."""
    if not path.is_dir():
        make_dirs(path.parent)
        path.mkdir(exist_ok=True)
        fsync_path(path.parent)


def write_text_atomically(path: Path, text: str) -> None:
    """Puts a new text file in the place of an old one; a reader sees the old or the new, whole."""
    temp = path.with_name(f"{path.name}.tmp")
    temp.unlink(missing_ok=True)
    try:
        write_durably(temp, text.encode())
        os.replace(temp, path)
    except OSError:
        temp.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)
