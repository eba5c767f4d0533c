"""The list of a checkpoint's files with their hashes, and the proof that a folder agrees with it.

Nothing here trusts a name found in a file: names are looked up among the regular files that a walk
of the folder found, and are never joined to a path before that.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import NamedTuple, NoReturn

from dragkit.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST_NAME = "MANIFEST.json"
FORMAT = "dragkit-checkpoint"
VERSION = 1
MAX_JSON_BYTES = 16 << 20

# Kinds of file a checkpoint may hold. None of them can carry code that loading would run.
SUFFIXES = frozenset({".safetensors", ".json", ".md", ".txt"})

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}){0,7}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STEP_FOLDER = re.compile(r"step-(\d{8,18})(?:\.old-\d{1,10})?")


class FileEntry(NamedTuple):
    """One file: name relative to the checkpoint with `/`, size in bytes, SHA-256 in hexadecimal."""

    name: str
    size: int
    sha256: str


class Manifest(NamedTuple):
    """What a complete checkpoint consists of."""

    step: int
    files: tuple[FileEntry, ...]


def step_of_folder(name: str) -> int | None:
    """The step that a checkpoint folder's name gives; None for any other name."""
    match = _STEP_FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def name_problem(name: str) -> str | None:
    """Why a file name cannot stand in a checkpoint, or None."""
    if not _NAME.fullmatch(name):
        return "the name is not a plain relative path of letters, digits, '_', '.' and '-'"
    if Path(name).suffix not in SUFFIXES:
        return f"a checkpoint holds only {', '.join(sorted(SUFFIXES))} files"
    return None


def encode_json(content: object) -> bytes:
    """JSON text of `content`; numbers that are not finite and foreign types raise."""
    # No newline at the end: with it, a file that has lost its last byte would still parse.
    return json.dumps(content, indent=1, allow_nan=False).encode()


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of MANIFEST.json."""
    files = [entry._asdict() for entry in sorted(manifest.files)]
    return encode_json(
        {"format": FORMAT, "version": VERSION, "step": manifest.step, "files": files}
    )


def _no_repeated_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key occurs twice")
    return content


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def read_json(path: Path) -> object:
    """Parse a JSON file of at most 16 MiB without repeated keys.

    Raises:
        CheckpointError: absent, too large or not JSON; the message starts with the file's name.
    """
    try:
        # A link, or a pipe that nobody writes to, is neither followed nor waited for.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(path, flags), "rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES} bytes")
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_no_repeated_keys,
            parse_constant=_no_constant,
        )
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name}: missing") from error
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: not valid JSON ({error})") from error


def list_files(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Walk a folder without following links.

    Returns:
        sizes: the size in bytes of every regular file by its name relative to `folder`.
        odd: links, pipes and devices; empty in a sound checkpoint.
    """
    sizes: dict[str, int] = {}
    odd: list[str] = []
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                name = Path(entry.path).relative_to(folder).as_posix()
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    sizes[name] = entry.stat(follow_symlinks=False).st_size
                else:
                    odd.append(name)
    return sizes, sorted(odd)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content in lower-case hexadecimal."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_entry(content: object) -> FileEntry:
    """One row of the manifest, checked field by field."""
    if not isinstance(content, dict) or set(content) != set(FileEntry._fields):
        raise CheckpointError(f"{MANIFEST_NAME}: a file row needs name, size and sha256")
    name, size, sha256 = content["name"], content["size"], content["sha256"]
    if not isinstance(name, str):
        raise CheckpointError(f"{MANIFEST_NAME}: a file name is not text")
    problem = name_problem(name)
    if problem is None and (type(size) is not int or size < 0):
        problem = "the size is not a count of bytes"
    if problem is None and (not isinstance(sha256, str) or not _SHA256.fullmatch(sha256)):
        problem = "the sha256 is not 64 hexadecimal digits"
    if problem is not None:
        raise CheckpointError(f"{MANIFEST_NAME}: {name[:200]!r}: {problem}")
    return FileEntry(name, size, sha256)


def read_manifest(folder: Path) -> Manifest:
    """Parse and check a checkpoint's manifest; the files themselves are not looked at.

    Raises:
        CheckpointError: absent, malformed, of another format or of another step than the folder.
    """
    content = read_json(folder / MANIFEST_NAME)
    if not isinstance(content, dict) or set(content) != {"format", "version", "step", "files"}:
        raise CheckpointError(f"{MANIFEST_NAME}: not the manifest of a dragkit checkpoint")
    if content["format"] != FORMAT or content["version"] != VERSION:
        raise CheckpointError(
            f"{MANIFEST_NAME}: format {content['format']!r} version {content['version']!r}; this "
            f"release reads {FORMAT!r} version {VERSION}"
        )
    step, rows = content["step"], content["files"]
    if type(step) is not int or step < 0 or not isinstance(rows, list):
        raise CheckpointError(f"{MANIFEST_NAME}: 'step' or 'files' has the wrong type")
    if step_of_folder(folder.name) not in (None, step):
        raise CheckpointError(f"{MANIFEST_NAME}: belongs to step {step}")
    files = tuple(_read_entry(row) for row in rows)
    if len({entry.name for entry in files}) < len(files):
        raise CheckpointError(f"{MANIFEST_NAME}: a file is listed twice")
    return Manifest(step, files)


def verify_checkpoint(folder: Path, *, hashes: bool = True) -> Manifest:
    """Prove that a folder holds exactly the files of its manifest, with their sizes and contents.

    Files that the manifest does not list make a checkpoint invalid; those whose names start with a
    dot, which desktop and network file systems scatter, are only logged.

    Args:
        folder: the checkpoint.
        hashes: False to compare names and sizes only.

    Returns:
        The manifest.

    Raises:
        CheckpointError: one line for each file that is wrong, with the reason.
    """
    try:
        manifest = read_manifest(folder)
        sizes, odd = list_files(folder)
        problems = [f"{name}: neither a file nor a folder (a link is not followed)" for name in odd]
        listed = {entry.name for entry in manifest.files}
        for name in sorted(sizes.keys() - listed - {MANIFEST_NAME}):
            if name.rpartition("/")[2].startswith("."):
                logger.warning("%s: %s is not part of the checkpoint", folder, name)
            else:
                problems.append(f"{name}: not listed in {MANIFEST_NAME}")
        for name, size, sha256 in manifest.files:
            if name not in sizes:
                problems.append(f"{name}: missing")
            elif sizes[name] != size:
                problems.append(f"{name}: {sizes[name]} bytes, expected {size}")
            elif hashes and hash_file(folder / name) != sha256:
                problems.append(f"{name}: the content differs from its sha256")
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error})") from error
    if problems:
        raise CheckpointError("\n".join(problems))
    return manifest
