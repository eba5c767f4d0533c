"""Cache folders of arrays and strings: written once, sealed by a manifest, then memory-mapped."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from dragkit.data.cache import commit_folder
from dragkit.errors import WriteError

logger = logging.getLogger(__name__)

T = TypeVar("T")

MANIFEST = "manifest.json"
_META = "meta.json"
# Hashing on open reads every byte. In a larger folder only the file sizes are compared.
_MAX_VERIFIED_BYTES = 256_000_000
_ATTEMPTS = 3
_DIGEST = re.compile(r"[0-9a-f]{32}")
_SETTLED_S = 2.0


class CorruptCache(Exception):
    """A cache folder is incomplete or damaged. `open_or_build` catches it and rebuilds."""


class ArrayWriter:
    """Appends to a one-dimensional .npy file whose length is unknown until `close`."""

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self.dtype = np.dtype(dtype)
        self.length = 0
        self._file = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        # NumPy pads the header, so the final length fits into the space of the first one.
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: np.ndarray | Iterable[int]) -> None:
        """Appends values."""
        array = np.ascontiguousarray(values, dtype=self.dtype)
        self._file.write(array.data)
        self.length += array.size

    def close(self) -> None:
        """Rewrites the header with the final length and closes the file."""
        self._file.seek(0)
        self._write_header()
        self._file.close()


class OffsetsWriter(ArrayWriter):
    """Appends to the int64 offsets of items end to end, which begin with 0."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, np.int64)
        self.end = 0
        self.append([0])

    def extend(self, counts: np.ndarray | Sequence[int]) -> None:
        """Appends the end of each of the next items, given their lengths."""
        if not len(counts):
            return
        ends = np.cumsum(counts, dtype=np.int64) + self.end
        self.append(ends)
        self.end = int(ends[-1])


class StringsWriter:
    """Appends strings as UTF-8 bytes and their offsets."""

    def __init__(self, folder: Path, name: str) -> None:
        self._bytes = ArrayWriter(folder / f"{name}.bytes.npy", np.uint8)
        self._ptr = OffsetsWriter(folder / f"{name}.ptr.npy")

    def append(self, strings: Sequence[str]) -> None:
        """Appends strings."""
        # Encoding them one by one would take several times longer.
        self._bytes.append(np.frombuffer("".join(strings).encode("utf-8"), dtype=np.uint8))
        self._ptr.extend([len(s) if s.isascii() else len(s.encode("utf-8")) for s in strings])

    def append_folder(self, folder: Path, name: str) -> None:
        """Appends the strings `name` of a folder."""
        self._bytes.append(read_array(folder, f"{name}.bytes"))
        self._ptr.extend(np.diff(read_array(folder, f"{name}.ptr")))

    def close(self) -> None:
        """Closes both files."""
        self._bytes.close()
        self._ptr.close()


class FolderWriter:
    """Writers of the arrays and strings of a folder. Each is created when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._arrays: dict[str, ArrayWriter] = {}
        self._offsets: dict[str, OffsetsWriter] = {}
        self._strings: dict[str, StringsWriter] = {}

    def array(self, name: str, dtype: type[np.generic]) -> ArrayWriter:
        """Returns the writer of the array `name`."""
        if name not in self._arrays:
            self._arrays[name] = ArrayWriter(self.folder / f"{name}.npy", dtype)
        return self._arrays[name]

    def offsets(self, name: str) -> OffsetsWriter:
        """Returns the writer of the offsets `name`."""
        if name not in self._offsets:
            self._offsets[name] = OffsetsWriter(self.folder / f"{name}.npy")
        return self._offsets[name]

    def strings(self, name: str) -> StringsWriter:
        """Returns the writer of the strings `name`."""
        if name not in self._strings:
            self._strings[name] = StringsWriter(self.folder, name)
        return self._strings[name]

    def close(self) -> None:
        """Closes all files."""
        for writers in (self._arrays, self._offsets, self._strings):
            for writer in writers.values():
                writer.close()


def read_array(folder: Path, name: str) -> np.ndarray:
    """Maps the array `name` read-only."""
    mapped = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    # Slicing a plain array is several times faster than slicing a `np.memmap`.
    return mapped.view(np.ndarray)


class Strings:
    """Strings written by `StringsWriter`. They are decoded when read."""

    def __init__(self, folder: Path, name: str) -> None:
        self._bytes = read_array(folder, f"{name}.bytes")
        self._ptr = read_array(folder, f"{name}.ptr")

    def __len__(self) -> int:
        return len(self._ptr) - 1

    def slice(self, start: int, stop: int) -> list[str]:
        """Returns strings start..stop-1."""
        ptr = self._ptr[start : stop + 1].tolist()
        data = self._bytes[ptr[0] : ptr[-1]].tobytes()
        offsets = [end - ptr[0] for end in ptr]
        return [data[a:b].decode("utf-8") for a, b in zip(offsets, offsets[1:], strict=False)]

    def __getitem__(self, row: int) -> str:
        return self.slice(row, row + 1)[0]


def file_digest(path: Path) -> str:
    """Returns the 128-bit blake2b of a file. Checkpoints record keys that contain it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def remembered_digest(path: Path, folder: Path) -> str:
    """Returns `file_digest`. That of a large file is kept, because hashing takes seconds per GB.

    It is computed again if the file's name, size, time or inode change.

    Args:
        path: the file.
        folder: keeps the digests, if it can be written.
    """
    status = path.stat()
    if status.st_size <= _MAX_VERIFIED_BYTES:
        return file_digest(path)
    key = (str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino)
    note = folder / cache_key(*key)
    if note.is_file() and _DIGEST.fullmatch(digest := note.read_text()):
        return digest
    digest = file_digest(path)
    # A file that was just written may change once more within the resolution of its time.
    if time.time() - status.st_mtime > _SETTLED_S:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
                file.write(digest)
            Path(file.name).replace(note)
        except OSError as error:
            logger.debug("%s: the digest of %s is not kept: %s", folder, path, error)
    return digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_key(*parts: object) -> str:
    """Returns a folder name that changes with any of `parts`."""
    return hashlib.blake2b(repr(parts).encode("utf-8"), digest_size=16).hexdigest()


def seal_folder(folder: Path, meta: dict[str, object]) -> None:
    """Writes `meta` and a manifest with the name, size and SHA-256 of every file."""
    (folder / _META).write_text(json.dumps(meta))
    files = [
        {"name": file.name, "size": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.iterdir())
    ]
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1))


def open_sealed(folder: Path) -> dict[str, object]:
    """Checks a folder against its manifest and returns its `meta`.

    Raises:
        CorruptCache: a file is missing or differs from the manifest.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        verify_hash = sum(entry["size"] for entry in files) <= _MAX_VERIFIED_BYTES
        for entry in files:
            path = folder / entry["name"]
            if path.stat().st_size != entry["size"]:
                raise CorruptCache(f"the size of {path.name} differs from the manifest")
            if verify_hash and _sha256(path) != entry["sha256"]:
                raise CorruptCache(f"the SHA-256 of {path.name} differs from the manifest")
        return json.loads((folder / _META).read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCache(f"a file or the manifest cannot be read: {error}") from error


def _discard_folder(folder: Path) -> None:
    """Renames a damaged folder so that its name is free at once, then deletes it."""
    if not folder.exists():
        return
    trash = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    try:
        folder.rename(trash / folder.name)
    except FileNotFoundError:
        logger.debug("%s: another process has already removed it", folder)
    shutil.rmtree(trash, ignore_errors=True)


def _unusable(folder: Path, error: OSError) -> WriteError:
    return WriteError(
        f"{folder}: cannot use this cache folder: {error.strerror or error}. Name another folder "
        "with DRAGKIT_CACHE or --set data.cache_dir=FOLDER."
    )


def open_or_build(folder: Path, open_folder: Callable[[], T], fill: Callable[[Path], None]) -> T:
    """Opens a sealed folder. Builds it first if it is absent or damaged.

    Args:
        folder: folder whose name is a key of its content.
        open_folder: opens it, or raises `CorruptCache`.
        fill: writes and seals the content in the folder that it is given.

    Raises:
        WriteError: the cache cannot be written, or the new folder cannot be opened.
    """
    for _ in range(_ATTEMPTS):
        try:
            if folder.is_dir():
                return open_folder()
        except (CorruptCache, FileNotFoundError) as error:
            # FileNotFoundError: another process may replace the folder while it is read.
            logger.warning("%s: rebuilding this cache folder: %s", folder, error)
        except OSError as error:
            raise _unusable(folder, error) from error
        try:
            _discard_folder(folder)
        except OSError as error:
            raise _unusable(folder, error) from error
        commit_folder(folder, fill)
    try:
        return open_folder()
    except (CorruptCache, FileNotFoundError) as error:
        raise WriteError(
            f"{folder}: the cache folder was just built but cannot be opened: {error}. Check the "
            "disk, or name another folder with --set data.cache_dir=FOLDER."
        ) from error
