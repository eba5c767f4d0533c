"""Durable file operations: what a checkpoint needs so that a crash at any instant loses nothing.

The functions of the first part are the only places where a checkpoint changes the disk, one system
call each. They are looked up by name at every use, so that a test can put a fault at any of them.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

CHUNK_BYTES = 8 << 20


def make_folder(path: Path) -> None:
    """Make one folder; its parent exists and it does not."""
    os.mkdir(path)


def create(path: Path) -> int:
    """Open a new file for writing; an existing file or link of that name is an error."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)


def write(descriptor: int, data: memoryview) -> int:
    """Write some of `data` and return how many bytes went out."""
    return os.write(descriptor, data)


def sync(descriptor: int) -> None:
    """Wait until a file or folder has reached the disk."""
    os.fsync(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename in one step; a file in the way is replaced, a filled folder in the way is an error."""
    os.replace(source, target)


def unlink(path: Path) -> None:
    """Remove one file or link."""
    os.unlink(path)


def rmdir(path: Path) -> None:
    """Remove one empty folder."""
    os.rmdir(path)


def write_file(path: Path, data: bytes) -> str:
    """Write a new file and wait for the disk.

    Args:
        path: a name that does not exist yet.
        data: the whole content.

    Returns:
        SHA-256 of the content in lower-case hexadecimal, taken from memory and not read back, so
        that a fault on the way to the disk shows at the next verification.

    Raises:
        OSError: from the system; a part of the file may be left.
    """
    rest = memoryview(data)
    descriptor = create(path)
    try:
        while rest:
            rest = rest[write(descriptor, rest[:CHUNK_BYTES]) :]
        sync(descriptor)
    finally:
        os.close(descriptor)
    return hashlib.sha256(data).hexdigest()


def sync_path(path: Path) -> None:
    """Wait until a file that somebody else wrote, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        sync(descriptor)
    except OSError as error:
        # Some network file systems have no fsync for folders; there is nothing further to wait for.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def make_folders(path: Path) -> None:
    """Make a folder and its missing parents, each durable before the next."""
    if path.is_dir():
        return
    if path.parent != path:
        make_folders(path.parent)
    try:
        make_folder(path)
    except FileExistsError:
        if not path.is_dir():
            raise
    sync_path(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Put a new text file in the place of an old one; a reader sees the old or the new, whole."""
    temp = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        write_file(temp, text.encode())
        rename(temp, path)
    except OSError:
        remove_quietly(temp)
        raise
    sync_path(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a file, a link (never what it points to) or a folder with all it holds."""
    if path.is_dir() and not path.is_symlink():
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            remove_tree(Path(entry.path))
        rmdir(path)
    else:
        unlink(path)


def remove_quietly(path: Path) -> None:
    """`remove_tree` for clean-up: a failure is logged and the caller goes on."""
    try:
        if path.is_symlink() or path.exists():
            remove_tree(path)
    except OSError as error:
        logger.warning("%s: could not be removed (%s)", path, error.strerror or error)


def free_bytes(path: Path) -> int:
    """Bytes that an ordinary user can still write to the file system that holds `path`."""
    return shutil.disk_usage(path).free


def process_is_alive(pid: int) -> bool:
    """Whether a process of this number runs on this machine, whoever owns it."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
