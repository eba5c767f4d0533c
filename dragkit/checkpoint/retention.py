"""The checkpoint folders of a run: commit, recovery after a crash, retention, and search.

`step-<n>` is a checkpoint. `step-<n>.tmp` is being written or removed. `step-<n>.old` is an intact
checkpoint whose replacement is being committed. Only the holder of the run's lock changes these
folders, so a leftover belongs to a writer that died.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from dragkit.checkpoint.atomic import fsync_path
from dragkit.checkpoint.manifest import MANIFEST_NAME, step_of_folder, verify_checkpoint
from dragkit.errors import CheckpointError, DataError, MissingInputError, similar_names

logger = logging.getLogger(__name__)

_PICKLE_HINT = (
    "dragkit reads no pickle. A checkpoint of the earlier implementation (.pt) holds a different "
    "model: train phase 1 again"
)
# Earlier versions appended a process number to the suffix.
_LEFTOVER = re.compile(r"(step-\d{8,18}|latest|best)\.(tmp|old)(?:-\d+)?")
_POINTER_TARGET = re.compile(r"step-\d{8,18}")


def commit(temp: Path, final: Path) -> None:
    """Renames a complete folder to its final name. An existing one becomes `.old` meanwhile."""
    old = final.with_name(f"{final.name}.old")
    replaces = final.exists()
    if replaces:
        os.replace(final, old)
    os.replace(temp, final)
    fsync_path(final.parent)
    if replaces:
        remove(old)


def remove(folder: Path) -> None:
    """Removes a checkpoint or a leftover. A failure is logged.

    A checkpoint is first renamed to `.tmp`, so that a search never finds a part of it.
    """
    try:
        temp = folder
        if step_of_folder(folder.name) is not None:
            temp = folder.with_name(folder.name.partition(".")[0] + ".tmp")
        if folder != temp:
            os.replace(folder, temp)
        if temp.is_symlink() or temp.is_file():
            temp.unlink()
        else:
            shutil.rmtree(temp)
    except OSError as error:
        logger.warning("%s: could not be removed (%s)", folder, error)


def _checkpoint_folders(root: Path) -> list[Path]:
    """Folders named as checkpoints, the newest step first, `.old` after the same step."""
    steps = {path: step_of_folder(path.name) for path in root.iterdir() if path.is_dir()}
    named = [path for path, step in steps.items() if step is not None]
    return sorted(named, key=lambda path: (-steps[path], path.name))


def last_intact(root: Path) -> Path | None:
    """The newest checkpoint with the names and sizes of its manifest. Hashes are not checked."""
    folders = _checkpoint_folders(root) if os.path.isdir(root) else []
    return next((folder for folder in folders if _is_intact(folder, hashes=False)), None)


def _is_intact(folder: Path, *, hashes: bool) -> bool:
    try:
        verify_checkpoint(folder, hashes=hashes)
    except CheckpointError:
        return False
    return True


def recover(root: Path) -> None:
    """Removes the leftovers of a writer that died.

    An `.old` checkpoint gets its name back if its replacement is missing or damaged.
    """
    # In reverse order `.tmp` comes before `.old`: `remove` needs the `.tmp` name of a step.
    for path in sorted(root.iterdir(), reverse=True):
        if (match := _LEFTOVER.fullmatch(path.name)) is None:
            continue
        final = root / match[1]
        if match[2] == "tmp" or _is_intact(final, hashes=True):
            remove(path)
        else:
            if final.exists():
                remove(final)
            os.replace(path, final)


def prune(root: Path, newest: Path, keep: int) -> None:
    """Removes checkpoints older than the last `keep`, except `newest` and the best.

    A checkpoint with missing or truncated files does not count towards `keep`. Errors are logged.
    """
    try:
        best = _read_pointer(root / "best")
        kept = 0
        for folder in _checkpoint_folders(root):
            if "." in folder.name:
                continue  # `recover` handles `.old`
            if kept < keep:
                kept += _is_intact(folder, hashes=False)
            elif folder != newest and folder.name != best:
                remove(folder)
    except (OSError, CheckpointError) as error:
        logger.warning("%s: no old checkpoint was removed (%s)", root, error)


def _read_pointer(path: Path) -> str | None:
    """The folder name in the file `best`, or None if there is no such file."""
    if path.is_fifo():
        # It would wait for a writer.
        raise CheckpointError(f"{path}: is a named pipe, not a file")
    try:
        name = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not _POINTER_TARGET.fullmatch(name):
        raise CheckpointError(f"{path}: {name!r} is not the name of a checkpoint folder")
    return name


def require_folder(path: Path) -> None:
    """Refuses a path that is missing or a file. No file is opened."""
    if not os.path.exists(path):
        raise MissingInputError(
            f"{path}: no such folder.{similar_names(path)} Expected a run's checkpoint folder or a "
            "step-<n> folder in it"
        )
    if not os.path.isdir(path):
        raise DataError(
            f"{path} is a file. A checkpoint is a folder with {MANIFEST_NAME}. {_PICKLE_HINT}"
        )


def find_checkpoint(path: Path, pointer: str = "latest") -> Path:
    """Finds and verifies the newest checkpoint, or the best.

    The newest checkpoint has the highest step. File times are ignored. A damaged one is logged and
    the next older one is tried. A checkpoint given by folder, or as the best, has no substitute.

    Args:
        path: folder of checkpoints, one checkpoint, or the file `latest` or `best`.
        pointer: "latest" or "best".

    Raises:
        CheckpointError: no checkpoint verifies. The message lists every reason.
        MissingInputError: there is no checkpoint.
        DataError: the path is a file, such as a pickle.
        ValueError: `pointer` is another word.
    """
    path = Path(path)
    if path.name in ("latest", "best") and os.path.isfile(path):
        path, pointer = path.parent, path.name
    if pointer not in ("latest", "best"):
        raise ValueError(f"pointer is {pointer!r}, expected 'latest' or 'best'")
    require_folder(path)
    if step_of_folder(path.name) is None and not (path / MANIFEST_NAME).exists():
        if pointer == "latest":
            return _find_newest(path)
        if (name := _read_pointer(path / "best")) is None:
            raise MissingInputError(f"{path}: no checkpoint is marked as best. Use the latest.")
        path /= name
    verify_checkpoint(path)
    return path


def _find_newest(root: Path) -> Path:
    reasons: list[str] = []
    for folder in _checkpoint_folders(root):
        try:
            verify_checkpoint(folder)
            return folder
        except CheckpointError as error:
            logger.warning("%s. Trying the next older checkpoint", error)
            reasons.append(str(error))
    if reasons:
        raise CheckpointError(
            f"{root}: no intact checkpoint. Restore one from a copy, or start in a new folder.\n"
            + "\n".join(reasons)
        )
    raise MissingInputError(
        f"{root}: no checkpoint. Expected folders such as step-00000100. {_PICKLE_HINT}"
    )
