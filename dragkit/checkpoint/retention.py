"""The folders of a run's checkpoints: commit, clean-up, retention, and the search for a good one.

`step-<n>` is a checkpoint, `step-<n>.tmp` one being written or removed, and `step-<n>.old` one that
makes room for its replacement; the last is still good. Only the holder of the run's lock changes
anything here, so whatever a writer has left is of one that died.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from dragkit.checkpoint.atomic import fsync_path
from dragkit.checkpoint.manifest import MANIFEST_NAME, step_of_folder, verify_checkpoint
from dragkit.errors import CheckpointError, DataError, MissingInputError

logger = logging.getLogger(__name__)

_PICKLE_HINT = (
    "dragkit reads no pickle: a checkpoint of the earlier implementation (.pt) holds a different "
    "model, train phase 1 again"
)
# Earlier writers put a process number behind the suffix.
_LEFTOVER = re.compile(r"(step-\d{8,18}|latest|best)\.(tmp|old)(?:-\d+)?")
_POINTER_TARGET = re.compile(r"step-\d{8,18}")


def commit(temp: Path, final: Path) -> None:
    """Gives a complete folder its name; a folder in the way steps aside until that is durable."""
    old = final.with_name(f"{final.name}.old")
    replaces = final.exists()
    if replaces:
        os.replace(final, old)
    os.replace(temp, final)
    fsync_path(final.parent)
    if replaces:
        remove(old)


def remove(folder: Path) -> None:
    """Removes a checkpoint or what is left of one; a failure is logged.

    A checkpoint loses its name first, so that no half of it is ever found.
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
    """Folders with a checkpoint's name, newest step first, `.old` ones after their step."""
    steps = {path: step_of_folder(path.name) for path in root.iterdir() if path.is_dir()}
    found = [path for path, step in steps.items() if step is not None]
    return sorted(found, key=lambda path: (-steps[path], path.name))


def last_intact(root: Path) -> Path | None:
    """The newest checkpoint whose names and sizes agree; contents are not hashed."""
    folders = _checkpoint_folders(root) if root.is_dir() else []
    return next((folder for folder in folders if _is_intact(folder, hashes=False)), None)


def _is_intact(folder: Path, *, hashes: bool) -> bool:
    try:
        verify_checkpoint(folder, hashes=hashes)
    except CheckpointError:
        return False
    return True


def recover(root: Path) -> None:
    """Clears what a writer that died has left.

    A checkpoint that had stepped aside for its replacement comes back if that never arrived or is
    damaged.
    """
    # Temporary ones first: their names are needed to discard others.
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
    """Removes what is older than the last `keep` whole checkpoints, but not `newest` or the best.

    A folder with missing or cut files does not count towards `keep`. Nothing here is fatal.
    """
    try:
        best = _read_pointer(root / "best")
        kept = 0
        for folder in _checkpoint_folders(root):
            if "." in folder.name:
                continue  # an old copy belongs to its step
            if kept < keep:
                kept += _is_intact(folder, hashes=False)
            elif folder != newest and folder.name != best:
                remove(folder)
    except (OSError, CheckpointError) as error:
        logger.warning("%s: no old checkpoint was removed (%s)", root, error)


def _read_pointer(path: Path) -> str | None:
    """The folder name in `best`; None where there is no such file."""
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
    """Refuses a path that cannot be a checkpoint: absent, or a file. No file is opened."""
    if not path.exists():
        raise MissingInputError(
            f"{path}: no such folder; expected a run's checkpoint folder or a step-<n> folder in it"
        )
    if not path.is_dir():
        raise DataError(
            f"{path}: a file; a dragkit checkpoint is a folder with {MANIFEST_NAME}. {_PICKLE_HINT}"
        )


def find_checkpoint(path: Path, pointer: str = "latest") -> Path:
    """The newest checkpoint that verifies, or the best.

    "Newest" goes by step number, never by file time. A damaged one is logged with its reasons and
    the next older is taken; but one that was asked for by name, or as the best, is not replaced by
    another.

    Args:
        path: folder of checkpoints, one checkpoint, or the file `latest` or `best`.
        which: "latest" or "best".

    Returns:
        A folder that has just been verified.

    Raises:
        CheckpointError: nothing there verifies; lists every reason.
        MissingInputError: there is nothing at all.
        DataError: the path is a file, such as a pickle.
        ValueError: `pointer` is another word.
    """
    path = Path(path)
    if path.name in ("latest", "best") and path.is_file():
        path, pointer = path.parent, path.name
    if pointer not in ("latest", "best"):
        raise ValueError(f"pointer is {pointer!r}; 'latest' or 'best' was expected")
    require_folder(path)
    if step_of_folder(path.name) is not None or (path / MANIFEST_NAME).exists():
        verify_checkpoint(path)
        return path
    return _find_best(path) if pointer == "best" else _find_newest(path)


def _find_best(root: Path) -> Path:
    name = _read_pointer(root / "best")
    if name is None:
        raise MissingInputError(f"{root}: no best checkpoint has been marked; ask for the latest")
    verify_checkpoint(root / name)
    return root / name


def _find_newest(root: Path) -> Path:
    reasons: list[str] = []
    for folder in _checkpoint_folders(root):
        try:
            verify_checkpoint(folder)
            return folder
        except CheckpointError as error:
            logger.warning("%s; the next older checkpoint is tried", error)
            reasons.append(str(error))
    if reasons:
        raise CheckpointError(
            f"{root}: no usable checkpoint; restore one from a copy, or start into a new folder\n"
            + "\n".join(reasons)
        )
    raise MissingInputError(
        f"{root}: no checkpoint here; expected folders such as step-00000100. {_PICKLE_HINT}"
    )
