"""The manifest of a checkpoint: its files with sizes and hashes, and their verification."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from dragkit.config.unique_keys import unique_keys
from dragkit.errors import CheckpointError

MANIFEST_NAME = "MANIFEST.json"
FORMAT_VERSION = 1

# No part begins with a dot, so no name leads out of the folder. None of these file types can carry
# code that loading would run.
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
FILE_NAME = rf"^{_PART}(/{_PART})*\.(safetensors|json|md|txt)\Z"
_STEP_FOLDER = re.compile(r"step-(\d{8,18})(?:\.old(?:-\d+)?)?")

NonNegativeInt = Annotated[int, msgspec.Meta(ge=0)]
Content = TypeVar("Content")


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file: path relative to the checkpoint, size in bytes, SHA-256 in hexadecimal."""

    name: Annotated[str, msgspec.Meta(pattern=FILE_NAME)]
    size: NonNegativeInt
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of `MANIFEST.json`: all files of a complete checkpoint."""

    format: Literal["dragkit-checkpoint"]
    version: Literal[FORMAT_VERSION]
    step: NonNegativeInt
    files: list[FileEntry]


def step_of_folder(name: str) -> int | None:
    """The step in the name of a checkpoint folder, or None for any other name."""
    match = _STEP_FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def encode_json(content: object) -> bytes:
    """Encodes `content` as JSON. Raises ValueError for NaN, infinity and unknown types."""
    # No newline at the end: a file that lost its last byte must not parse.
    return json.dumps(content, indent=1, allow_nan=False).encode()


def read_json(path: Path, json_type: type[Content]) -> Content:
    """Parses a JSON file into `json_type`, a msgspec struct, a dataclass or `object`.

    Raises:
        CheckpointError: the file is missing, is not JSON or has another form.
    """
    try:
        document = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name}: missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: cannot be read ({error})") from error
    return _convert(document, json_type, path.name)


def _convert(document: object, json_type: type[Content], name: str) -> Content:
    try:
        return msgspec.convert(document, json_type)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{name}: cannot be read ({error})") from error


def _refuse_newer(document: object) -> None:
    version = document.get("version") if isinstance(document, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{MANIFEST_NAME}: a newer dragkit saved this in format {version}, and this one "
            f"reads format {FORMAT_VERSION}. Update dragkit"
        )


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content in lower-case hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_checkpoint(folder: Path, *, hashes: bool = True) -> Manifest:
    """Checks that a folder holds exactly the files of its manifest, with their sizes and hashes.

    Files whose names start with a dot are ignored, because file systems add them.

    Args:
        folder: the checkpoint.
        hashes: False compares names and sizes only.

    Raises:
        CheckpointError: lists every wrong file with the reason.
    """
    try:
        document = read_json(folder / MANIFEST_NAME, object)
        _refuse_newer(document)
        manifest = _convert(document, Manifest, MANIFEST_NAME)
        problems = (
            []
            if step_of_folder(folder.name) in (None, manifest.step)
            else [f"{MANIFEST_NAME}: belongs to step {manifest.step}"]
        )
        listed = {MANIFEST_NAME, *(entry.name for entry in manifest.files)}
        # Unlisted files come from another writer, so the folder is not what was saved.
        for path in sorted(folder.rglob("[!.]*")):
            name = path.relative_to(folder).as_posix()
            if name not in listed and not path.is_dir():
                problems.append(f"{name}: not listed in {MANIFEST_NAME}")
        for entry in manifest.files:
            path = folder / entry.name
            if not path.is_file():
                problems.append(f"{entry.name}: missing")
            elif (size := path.stat().st_size) != entry.size:
                problems.append(f"{entry.name}: {size} bytes, expected {entry.size}")
            elif hashes and hash_file(path) != entry.sha256:
                problems.append(f"{entry.name}: the content differs from its sha256")
    except (CheckpointError, OSError) as error:
        problems = [str(error)]
    if problems:
        raise CheckpointError(f"{folder}: the checkpoint is not intact\n  " + "\n  ".join(problems))
    return manifest
