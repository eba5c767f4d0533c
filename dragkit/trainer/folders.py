"""The folders of a run's checkpoints: commit, clean-up, retention, and the search for a good one.

`step-<n>` is a checkpoint, `step-<n>.tmp-<pid>` one being written or removed, and
`step-<n>.old-<pid>` one that makes room for its replacement; the last is still good.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from dragkit.errors import CheckpointError, DataError, MissingInputError
from dragkit.trainer import atomic
from dragkit.trainer.lock import is_locked_elsewhere, is_locked_here
from dragkit.trainer.manifest import MANIFEST_NAME, Manifest, step_of_folder, verify_checkpoint

logger = logging.getLogger(__name__)

PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"})
_TEMP = re.compile(r"(step-\d{8,18}|latest|best)\.tmp-(\d{1,10})")
_OLD = re.compile(r"(step-\d{8,18})\.old-(\d{1,10})")
_POINTED = re.compile(r"step-\d{8,18}")


def commit(temp: Path, final: Path) -> None:
    """Give a complete folder its name; a folder in the way steps aside until that is durable."""
    old = final.with_name(f"{final.name}.old-{os.getpid()}")
    replaces = final.exists()
    if replaces:
        atomic.rename(final, old)
    try:
        atomic.rename(temp, final)
    except OSError:
        if replaces:
            atomic.rename(old, final)
        raise
    atomic.sync_path(final.parent)
    if replaces:
        _discard(old)


def _discard(folder: Path) -> None:
    """Remove a checkpoint: it loses its name at once, so that no half of it is ever found."""
    try:
        name = folder.name.partition(".")[0]
        temp = folder.with_name(f"{name}.tmp-{os.getpid()}")
        atomic.rename(folder, temp)
        atomic.remove_tree(temp)
    except OSError as error:
        logger.warning("%s: the old checkpoint could not be removed (%s)", folder, error)


def _committed(root: Path) -> list[Path]:
    """Folders with a checkpoint's name, newest step first, `.old` ones behind their step."""
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    order = {name: step for name in names if (step := step_of_folder(name)) is not None}
    return [root / name for name in sorted(order, key=lambda name: (-order[name], "." in name))]


def last_good(root: Path) -> Path | None:
    """The newest checkpoint whose names and sizes agree; contents are not hashed."""
    return next((folder for folder in _committed(root) if _is_whole(folder, hashes=False)), None)


def _is_whole(folder: Path, *, hashes: bool) -> bool:
    try:
        verify_checkpoint(folder, hashes=hashes)
    except CheckpointError:
        return False
    return True


def tidy(root: Path, *, before_save: bool) -> None:
    """Clear what writers that died have left; failures are logged.

    A checkpoint that had stepped aside for its replacement comes back if that never arrived.
    """
    owned = is_locked_here(root)
    if not owned and is_locked_elsewhere(root):
        # The writer's process number means nothing on this machine.
        return
    for name in sorted(os.listdir(root)):
        temp, old = _TEMP.fullmatch(name), _OLD.fullmatch(name)
        match = temp or old
        if match is None:
            continue
        pid = int(match[2])
        dead = owned or not atomic.process_is_alive(pid)
        if not (before_save if pid == os.getpid() else dead):
            continue
        final = root / match[1]
        if old and not final.exists():
            _restore(root / name, final)
        elif temp or _is_whole(final, hashes=True):
            atomic.remove_quietly(root / name)


def _restore(old: Path, final: Path) -> None:
    try:
        atomic.rename(old, final)
        atomic.sync_path(final.parent)
    except OSError as error:
        logger.warning("%s: could not be renamed back (%s)", old, error)


def retain(root: Path, newest: Path, keep: int) -> None:
    """Remove what is older than the last `keep` whole checkpoints, but not `newest` or the best.

    A folder with missing or cut files does not count towards `keep`. Nothing here is fatal.
    """
    try:
        best = _read_pointer(root / "best")
        folders = [folder for folder in _committed(root) if "." not in folder.name]
        if folders[:1] != [newest]:
            logger.warning("%s: the step just saved is not the highest here", newest)
        kept = 0
        for folder in folders:
            if kept < keep:
                kept += _is_whole(folder, hashes=False)
            elif folder != newest and folder.name != best:
                _discard(folder)
    except (OSError, CheckpointError) as error:
        logger.warning("%s: no old checkpoint was removed (%s)", root, error)


def _read_pointer(path: Path) -> str | None:
    """The folder name in `best` or `latest`; None where there is no such file."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            name = file.read(100).decode("ascii").strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not _POINTED.fullmatch(name):
        raise CheckpointError(f"{path}: {name!r} is not the name of a checkpoint folder")
    return name


def refuse_non_folder(path: Path) -> None:
    """A path that cannot be a checkpoint: absent, or a file of whatever kind. No file is opened."""
    if path.is_dir():
        return
    if not path.exists():
        raise MissingInputError(
            f"{path}: no such folder; expected a run's checkpoint folder or a step-<n> folder in it"
        )
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise _pickle_error(path)
    raise DataError(f"{path}: a file; a dragkit checkpoint is a folder with {MANIFEST_NAME}")


def _pickle_error(path: Path) -> DataError:
    return DataError(
        f"{path}: looks like a pickle, and dragkit reads none; it reads its own checkpoint folders "
        f"(step-<n>/ with {MANIFEST_NAME}). A checkpoint of the earlier implementation holds a "
        "different model and cannot be loaded: train phase 1 again"
    )


def find_checkpoint(path: Path, which: str = "latest") -> Path:
    """The newest checkpoint that verifies, or the best.

    "Newest" goes by step number, never by file time. A damaged one is logged with its reasons and
    the next older is taken; but one that was asked for by name, or as the best, is not replaced by
    another.

    Args:
        path: folder of checkpoints, a run folder with `checkpoints/` in it, one checkpoint, or the
            file `latest` or `best`.
        which: "latest" or "best".

    Returns:
        A folder that has just been verified.

    Raises:
        CheckpointError: nothing there verifies; lists every reason.
        MissingInputError: there is nothing at all.
        DataError: the path is a file, such as a pickle.
        ValueError: `which` is another word.
    """
    path = Path(path)
    if path.name in ("latest", "best") and path.is_file():
        path, which = path.parent, path.name
    if which not in ("latest", "best"):
        raise ValueError(f"which is {which!r}; 'latest' or 'best' was expected")
    refuse_non_folder(path)
    try:
        if step_of_folder(path.name) is not None or (path / MANIFEST_NAME).exists():
            verify_or_explain(path)
            return path
        root = path
        if not _committed(path) and (path / "checkpoints").is_dir():
            root = path / "checkpoints"
        tidy(root, before_save=False)
        return _find_best(root) if which == "best" else _find_newest(root)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def verify_or_explain(folder: Path) -> Manifest:
    """`verify_checkpoint` with the folder's name in front of the reasons."""
    try:
        return verify_checkpoint(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder}: not a whole checkpoint\n  " + str(error).replace("\n", "\n  ")
        ) from error


def _find_best(root: Path) -> Path:
    name = _read_pointer(root / "best")
    if name is None:
        raise MissingInputError(f"{root}: no best checkpoint has been marked; ask for the latest")
    verify_or_explain(root / name)
    return root / name


def _find_newest(root: Path) -> Path:
    reasons: list[str] = []
    for folder in _committed(root):
        try:
            verify_or_explain(folder)
            return folder
        except CheckpointError as error:
            logger.warning("%s; the next older checkpoint is tried", error)
            reasons.append(str(error))
    if reasons:
        raise CheckpointError(
            f"{root}: no usable checkpoint; restore one from a copy, or start into a new folder\n"
            + "\n".join(reasons)
        )
    for name in sorted(os.listdir(root)):
        if Path(name).suffix.lower() in PICKLE_SUFFIXES:
            raise _pickle_error(root / name)
    raise MissingInputError(f"{root}: no checkpoint here; expected folders such as step-00000100")
