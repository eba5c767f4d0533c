"""The list of a checkpoint's files with their hashes, and the check of a folder against it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from dragkit.errors import CheckpointError

MANIFEST_NAME = "MANIFEST.json"

# Relative, no part begins with a dot, so no name leads out of the folder; and no kind of file that
# can carry code which loading would run.
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
FILE_NAME = rf"^{_PART}(/{_PART})*\.(safetensors|json|md|txt)\Z"
_STEP_FOLDER = re.compile(r"step-(\d{8,18})(?:\.old(?:-\d+)?)?")

NonNegativeInt = Annotated[int, msgspec.Meta(ge=0)]
Content = TypeVar("Content")


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file: name relative to the checkpoint with `/`, size in bytes, SHA-256 in hexadecimal."""

    name: Annotated[str, msgspec.Meta(pattern=FILE_NAME)]
    size: NonNegativeInt
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a complete checkpoint consists of."""

    format: Literal["dragkit-checkpoint"]
    version: Literal[1]
    step: NonNegativeInt
    files: list[FileEntry]


def step_of_folder(name: str) -> int | None:
    """The step that a checkpoint folder's name gives; None for any other name."""
    match = _STEP_FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def encode_json(content: object) -> bytes:
    """JSON text of `content`; numbers that are not finite and foreign types raise ValueError."""
    # No newline at the end: with it, a file that has lost its last byte would still parse.
    return json.dumps(content, indent=1, allow_nan=False).encode()


def read_json(path: Path, json_type: type[Content]) -> Content:
    """Parses a JSON file into `json_type`, a struct, a data class or `object`.

    Raises:
        CheckpointError: absent, not JSON or of another form; the message starts with the file name.
    """
    try:
        return msgspec.convert(json.loads(path.read_bytes()), json_type)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name}: missing") from error
    except (OSError, ValueError, RecursionError, msgspec.ValidationError) as error:
        raise CheckpointError(f"{path.name}: cannot be read ({error})") from error


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content in lower-case hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_checkpoint(folder: Path, *, hashes: bool = True) -> Manifest:
    """Proves that a folder holds exactly the files of its manifest, with their sizes and contents.

    Files that the manifest does not list make a checkpoint invalid, other than those whose names
    start with a dot, which desktop and network file systems scatter.

    Args:
        folder: the checkpoint; hashes: False to compare names and sizes only.

    Raises:
        CheckpointError: one line for each file that is wrong, with the reason.
    """
    try:
        manifest = read_json(folder / MANIFEST_NAME, Manifest)
        problems = (
            []
            if step_of_folder(folder.name) in (None, manifest.step)
            else [f"{MANIFEST_NAME}: belongs to step {manifest.step}"]
        )
        listed = {MANIFEST_NAME, *(entry.name for entry in manifest.files)}
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
        raise CheckpointError(f"{folder}: not a whole checkpoint\n  " + "\n  ".join(problems))
    return manifest
