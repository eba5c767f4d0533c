"""Checkpoints: one folder per step, which is either complete or absent.

The order of a save makes it atomic. All files go into a temporary folder, the manifest last. The
folder is renamed once everything is on the disk. Then `latest` and `best` are replaced, and only
then are old checkpoints removed. No other format than safetensors and JSON is ever parsed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dragkit.checkpoint.atomic import fsync_path, make_dirs, write_durably, write_text_atomically
from dragkit.checkpoint.lock import RunInUseError, RunLock
from dragkit.checkpoint.manifest import (
    FILE_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    NonNegativeInt,
    encode_json,
    hash_file,
    read_json,
    step_of_folder,
    verify_checkpoint,
)
from dragkit.checkpoint.retention import (
    commit,
    find_checkpoint,
    last_intact,
    prune,
    recover,
    remove,
    require_folder,
)
from dragkit.checkpoint.tensors import (
    check_finite,
    flatten_optimizer_state,
    load_tensors_into,
    restore_optimizer_state,
    tensor_bytes,
)
from dragkit.errors import CheckpointError, WriteError

__all__ = [
    "LoadedCheckpoint",
    "RunInUseError",
    "RunLock",
    "Snapshot",
    "TrainState",
    "find_checkpoint",
    "flatten_optimizer_state",
    "load_checkpoint",
    "load_tensors_into",
    "mark_best",
    "restore_optimizer_state",
    "save_checkpoint",
    "verify_checkpoint",
]


# Names that are safe on every file system and lead out of no folder.
_STEM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class TrainState:
    """The position of a run, saved as `state.json`.

    Attributes:
        phase: name of the phase.
        epoch: finished epochs.
        step: optimizer steps done. It names the checkpoint's folder.
        batch: batches done in the current epoch.
        questions_seen: questions over all epochs.
        best: best validation value so far, None before the first validation.
        extra: further JSON values (hashes, versions, learning rate).
    """

    phase: str
    epoch: NonNegativeInt
    step: NonNegativeInt
    batch: NonNegativeInt
    questions_seen: NonNegativeInt
    best: float | None = None
    extra: dict[str, object] = field(default_factory=dict)


_JSON_TYPES: dict[str, type] = {"state.json": TrainState}


@dataclass(slots=True)
class Snapshot:
    """The content of a checkpoint to save.

    Attributes:
        tensors: file stem -> tensors by name, one safetensors file each.
        folders: folder name -> function that fills the given empty folder (PEFT's layout).
        json: file stem -> JSON value. The stem "state" is reserved for the `TrainState`.
    """

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    folders: dict[str, Callable[[Path], None]] = field(default_factory=dict)
    json: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A verified checkpoint: tensors and JSON values by file stem, and its folder."""

    tensors: dict[str, dict[str, Tensor]]
    state: TrainState
    json: dict[str, object]
    folder: Path


def save_checkpoint(
    root: Path,
    step: int,
    snapshot: Snapshot,
    state: TrainState,
    *,
    keep: int = 3,
) -> Path:
    """Writes `<root>/step-<n>/` atomically: a crash leaves the whole old or the whole new state.

    Hold a `RunLock`, and save from one thread at a time.

    Args:
        root: folder of the run's checkpoints, made if absent.
        step: optimizer step, equal to `state.step`. An existing checkpoint of it is replaced.
        snapshot: content of the checkpoint.
        state: position of the run.
        keep: number of newest checkpoints that stay, at least 1. The best stays too.

    Returns:
        The new folder.

    Raises:
        CheckpointError: a value is NaN or infinite. Nothing is written.
        WriteError: the disk is full or fails. Older checkpoints stay.
        ValueError: the arguments contradict each other, or a name is not allowed.
    """
    documents = _encode_documents(step, snapshot, state, keep)
    for stem, tensors in snapshot.tensors.items():
        check_finite(tensors, f"{stem}.safetensors")
    root = Path(root)
    final = root / f"step-{step:08d}"
    temp = root / f"{final.name}.tmp"
    outcome = "not saved"
    try:
        make_dirs(root)
        # The caller holds the run's lock, so every leftover belongs to a dead writer.
        recover(root)
        _write_files(temp, step, snapshot, documents)
        commit(temp, final)
        # The checkpoint is committed. From here on only the pointer can be missing.
        outcome = "saved, but 'latest' could not be updated"
        write_text_atomically(root / "latest", f"{final.name}\n")
    except (OSError, SafetensorError) as error:
        last = last_intact(root)
        good = f"The last good checkpoint is {last}" if last else "There is no earlier checkpoint"
        raise WriteError(
            f"{final}: {outcome} ({error}). {good}. Free some space or choose another folder."
        ) from error
    finally:
        if temp.exists():
            remove(temp)
    prune(root, final, keep)
    return final


def mark_best(root: Path, step: int) -> None:
    """Points `best` at the saved checkpoint of a step.

    Raises:
        WriteError: the file cannot be written. `best` stays.
    """
    folder = root / f"step-{step:08d}"
    try:
        write_text_atomically(root / "best", f"{folder.name}\n")
    except OSError as error:
        raise WriteError(
            f"{folder}: saved, but 'best' could not be updated ({error}). Free some space or "
            "choose another folder."
        ) from error


def _encode_documents(
    step: int, snapshot: Snapshot, state: TrainState, keep: int
) -> dict[str, bytes]:
    """Checks the arguments of a save and encodes its JSON files by name."""
    if step < 0 or state.step != step or keep < 1:
        raise ValueError(
            f"step {step}, state.step {state.step} and keep {keep} contradict each other"
        )
    for stem in (*snapshot.json, *snapshot.tensors, *snapshot.folders):
        if not _STEM.fullmatch(stem) or stem in ("state", "MANIFEST"):
            raise ValueError(f"a checkpoint cannot have a part named {stem!r}")
    documents: dict[str, bytes] = {}
    for stem, content in {**snapshot.json, "state": dataclasses.asdict(state)}.items():
        try:
            documents[f"{stem}.json"] = encode_json(content)
        except ValueError as error:
            raise CheckpointError(f"{stem}.json: not saved, {error}") from error
    return documents


def _write_files(temp: Path, step: int, snapshot: Snapshot, documents: dict[str, bytes]) -> None:
    """Writes and fsyncs all files of a checkpoint in a new folder, the manifest last."""
    temp.mkdir()
    files: list[FileEntry] = []

    def write(name: str, data: bytes) -> None:
        files.append(FileEntry(name, len(data), write_durably(temp / name, data)))

    for stem, tensors in snapshot.tensors.items():
        write(f"{stem}.safetensors", tensor_bytes(tensors))
    for stem, fill_folder in snapshot.folders.items():
        (temp / stem).mkdir()
        fill_folder(temp / stem)
        # PEFT wrote these files without fsync, and nothing has checked their values.
        for path in sorted((temp / stem).rglob("*")):
            name = path.relative_to(temp).as_posix()
            if path.is_file():
                if not re.search(FILE_NAME, name):
                    raise ValueError(f"a checkpoint cannot contain a file named {name}")
                if path.suffix == ".safetensors":
                    check_finite(load_file(path), name)
                files.append(FileEntry(name, path.stat().st_size, hash_file(path)))
            fsync_path(path)
        fsync_path(temp / stem)
    for name, data in documents.items():
        write(name, data)
    files.sort(key=lambda entry: entry.name)
    manifest = Manifest("dragkit-checkpoint", FORMAT_VERSION, step, files)
    write_durably(temp / MANIFEST_NAME, encode_json(msgspec.to_builtins(manifest)))
    fsync_path(temp)


def load_checkpoint(folder: Path, *, device: str = "cpu") -> LoadedCheckpoint:
    """Verifies one checkpoint and reads its safetensors and JSON files.

    Sub-folders such as `adapter/` are verified but not read.

    Args:
        folder: a checkpoint, such as `find_checkpoint` returns.
        device: device of the tensors.

    Raises:
        CheckpointError: the checkpoint is damaged, or a file has another type than its name says.
        MissingInputError: there is no such folder.
        DataError: the path is a file, such as a pickle.
    """
    folder = Path(folder)
    require_folder(folder)
    tensors: dict[str, dict[str, Tensor]] = {}
    documents: dict[str, object] = {}
    for path in (folder / entry.name for entry in verify_checkpoint(folder).files):
        try:
            if path.parent != folder:
                continue  # a sub-folder has its own reader
            if path.suffix == ".safetensors":
                tensors[path.stem] = load_file(path, device=device)
            elif path.suffix == ".json":
                documents[path.stem] = read_json(path, _JSON_TYPES.get(path.name, object))
        except (CheckpointError, SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be loaded ({error})") from error
    state = documents.pop("state", None)
    # A copied checkpoint may have any name, but a step-<n> name must give its step.
    if not isinstance(state, TrainState) or step_of_folder(folder.name) not in (None, state.step):
        raise CheckpointError(f"{folder}: state.json is missing or of another step")
    return LoadedCheckpoint(tensors, state, documents, folder)
