"""Folders of memory-mapped arrays and strings that are written once, sealed, and then only read."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np

from dragkit.data.cache import commit_folder
from dragkit.errors import WriteError

logger = logging.getLogger(__name__)

T = TypeVar("T")

MANIFEST = "manifest.json"
_META = "meta.json"
# Opening hashes contents again up to this total. Beyond it only sizes are compared.
_VERIFIED_BYTES = 256_000_000
_ATTEMPTS = 3


class CorruptCache(Exception):
    """A cache folder is incomplete or damaged. Never reaches a user."""


class ArrayWriter:
    """Appends to a one-dimensional .npy file whose length is known only at the end."""

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self.dtype = np.dtype(dtype)
        self.length = 0
        self._file = path.open("wb")
        self._header()

    def _header(self) -> None:
        """Writes the header, in which numpy leaves room for a length that grows."""
        described = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, described)

    def append(self, values: np.ndarray | Iterable[int]) -> None:
        """Appends values."""
        array = np.ascontiguousarray(values, dtype=self.dtype)
        self._file.write(array.data)
        self.length += array.size

    def close(self) -> None:
        """Writes the header again, with the final length."""
        self._file.seek(0)
        self._header()
        self._file.close()


class StringsWriter:
    """Appends strings as UTF-8 bytes with their offsets."""

    def __init__(self, folder: Path, name: str) -> None:
        self._bytes = ArrayWriter(folder / f"{name}.bytes.npy", np.uint8)
        self._ptr = ArrayWriter(folder / f"{name}.ptr.npy", np.int64)
        self._ptr.append([0])

    def append(self, strings: Iterable[str]) -> None:
        """Appends strings."""
        encoded = [string.encode("utf-8") for string in strings]
        ends = np.cumsum([len(piece) for piece in encoded], dtype=np.int64) + self._bytes.length
        self._bytes.append(np.frombuffer(b"".join(encoded), dtype=np.uint8))
        self._ptr.append(ends)

    def close(self) -> None:
        """Finishes both files."""
        self._bytes.close()
        self._ptr.close()


class FolderWriter:
    """The arrays and strings of one folder, opened by name at their first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, ArrayWriter | StringsWriter] = {}

    def array(self, name: str, dtype: type[np.generic]) -> ArrayWriter:
        """The array `name`."""
        if name not in self._open:
            self._open[name] = ArrayWriter(self.folder / f"{name}.npy", dtype)
        return self._open[name]  # type: ignore[return-value]

    def strings(self, name: str) -> StringsWriter:
        """The strings `name`."""
        if name not in self._open:
            self._open[name] = StringsWriter(self.folder, name)
        return self._open[name]  # type: ignore[return-value]

    def close(self) -> None:
        """Finishes all files."""
        for writer in self._open.values():
            writer.close()


def read_array(folder: Path, name: str) -> np.ndarray:
    """A read-only memory map, as a plain array: slices of the memmap class are much slower."""
    mapped = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    return mapped.view(np.ndarray)


class Strings:
    """Strings written by `StringsWriter`, decoded when asked for."""

    def __init__(self, folder: Path, name: str) -> None:
        self._bytes = read_array(folder, f"{name}.bytes")
        self._ptr = read_array(folder, f"{name}.ptr")

    def __len__(self) -> int:
        return len(self._ptr) - 1

    def slice(self, first: int, last: int) -> list[str]:
        """Strings first..last-1."""
        ptr = self._ptr[first : last + 1].tolist()
        data = self._bytes[ptr[0] : ptr[-1]].tobytes()
        base = ptr[0]
        return [
            data[start - base : stop - base].decode("utf-8")
            for start, stop in zip(ptr, ptr[1:], strict=False)
        ]

    def __getitem__(self, row: int) -> str:
        return self.slice(row, row + 1)[0]


def file_digest(path: Path) -> str:
    """blake2b of a file's bytes. Checkpoints record keys made of it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_key(*parts: object) -> str:
    """A folder name that changes with any of `parts`."""
    return hashlib.blake2b(repr(parts).encode("utf-8"), digest_size=16).hexdigest()


def seal_folder(folder: Path, meta: dict[str, object]) -> None:
    """Writes `meta` and the manifest: name, size and SHA-256 of every file, as in checkpoints."""
    (folder / _META).write_text(json.dumps(meta))
    files = [
        {"name": file.name, "size": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.iterdir())
    ]
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1))


def open_sealed(folder: Path) -> dict[str, object]:
    """The `meta` of a sealed folder.

    Raises:
        Unusable: a file is missing or is not what was sealed.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        hashed = sum(entry["size"] for entry in files) <= _VERIFIED_BYTES
        for entry in files:
            path = folder / entry["name"]
            if path.stat().st_size != entry["size"]:
                raise CorruptCache(f"{path.name} has another size")
            if hashed and _sha256(path) != entry["sha256"]:
                raise CorruptCache(f"{path.name} has other content")
        return json.loads((folder / _META).read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCache(f"no readable manifest or file: {error}") from error


def discard_folder(folder: Path) -> None:
    """Takes a damaged folder out of the way at once, then deletes it."""
    if not folder.exists():
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    try:
        folder.rename(aside / folder.name)
    except FileNotFoundError:
        logger.debug("%s: another process has taken it away", folder)
    shutil.rmtree(aside, ignore_errors=True)


def open_or_build(folder: Path, opened: Callable[[], T], fill: Callable[[Path], None]) -> T:
    """Opens a sealed folder. An absent or damaged folder is built first.

    Args:
        folder: named after its content.
        opened: opens it, or raises `CorruptCache`.
        fill: writes and seals it in a temporary place.

    Raises:
        WriteError: the cache cannot be written, or does not hold what was written.
    """
    for _ in range(_ATTEMPTS):
        if folder.is_dir():
            try:
                return opened()
            except (CorruptCache, FileNotFoundError) as error:
                # A folder may also vanish under a reader while another process replaces it.
                logger.warning("%s: building it anew: %s", folder, error)
        discard_folder(folder)
        commit_folder(folder, fill)
    try:
        return opened()
    except (CorruptCache, FileNotFoundError) as error:
        raise WriteError(f"{folder}: was just built and is not usable: {error}") from error
