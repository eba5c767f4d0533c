"""Checkpoints: a folder per step that is either complete or not there.

A folder is written under a temporary name, its manifest last, and renamed when everything is on the
disk; `latest` and `best` are repointed after that, and old folders removed after that. Only
safetensors and JSON are ever parsed.
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
    "restore_optimizer_state",
    "save_checkpoint",
    "verify_checkpoint",
]


_STEM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a run stands.

    Attributes:
        phase: name of the phase.
        epoch: epochs finished.
        step: optimizer steps done; the checkpoint's number.
        batch: batches done inside the present epoch.
        questions_seen: questions trained on, all epochs together.
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
    """What a checkpoint is to contain.

    Attributes:
        tensors: file stem -> tensors by name, one safetensors file each.
        folders: folder name -> function that fills the given empty folder (PEFT's layout).
        json: file stem -> JSON value; "state" is taken by the `TrainState`.
    """

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    folders: dict[str, Callable[[Path], None]] = field(default_factory=dict)
    json: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A verified checkpoint: tensors and JSON values by file stem, and the folder for the rest."""

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
    is_best: bool = False,
) -> Path:
    """Writes `<root>/step-<n>/` so that a crash at any instant leaves the old or the new, whole.

    Saves to one root do not overlap: hold a `RunLock`, and save from one thread at a time.

    Args:
        root: folder of the run's checkpoints; made if absent.
        step: optimizer step, equal to `state.step`; a checkpoint of that step is replaced.
        snapshot: contents; state: position of the run, written as `state.json`.
        keep: newest checkpoints that stay, at least 1; the best stays too.
        is_best: point `best` at this checkpoint.

    Returns:
        The new folder.

    Raises:
        CheckpointError: a value is not finite; nothing is written.
        WriteError: the disk is full or fails; older checkpoints stay.
        ValueError: arguments that contradict each other or names that cannot be used.
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
        recover(root)
        _fill(temp, step, snapshot, documents)
        commit(temp, final)
        outcome = "saved, but 'latest' or 'best' could not be pointed at it"
        write_text_atomically(root / "latest", f"{final.name}\n")
        if is_best:
            write_text_atomically(root / "best", f"{final.name}\n")
    except (OSError, SafetensorError) as error:
        last = last_intact(root)
        good = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        raise WriteError(
            f"{final}: {outcome} ({error}); {good}; free some space or choose another folder"
        ) from error
    finally:
        if temp.exists():
            remove(temp)
    prune(root, final, keep)
    return final


def _encode_documents(
    step: int, snapshot: Snapshot, state: TrainState, keep: int
) -> dict[str, bytes]:
    """Checks the arguments of a save and encodes its JSON files."""
    if step < 0 or state.step != step or keep < 1:
        raise ValueError(f"step {step}, state.step {state.step}, keep {keep} do not go together")
    for stem in (*snapshot.json, *snapshot.tensors, *snapshot.folders):
        if not _STEM.fullmatch(stem) or stem in ("state", "MANIFEST"):
            raise ValueError(f"{stem!r} cannot be the name of a part of a checkpoint")
    documents: dict[str, bytes] = {}
    for stem, content in {**snapshot.json, "state": dataclasses.asdict(state)}.items():
        try:
            documents[f"{stem}.json"] = encode_json(content)
        except ValueError as error:
            raise CheckpointError(f"{stem}.json: not saved, {error}") from error
    return documents


def _fill(temp: Path, step: int, snapshot: Snapshot, documents: dict[str, bytes]) -> None:
    """Writes all files of a checkpoint into a new folder, the manifest last; waits for the disk."""
    temp.mkdir()
    files: list[FileEntry] = []

    def add(name: str, data: bytes) -> None:
        files.append(FileEntry(name, len(data), write_durably(temp / name, data)))

    for stem, tensors in snapshot.tensors.items():
        add(f"{stem}.safetensors", tensor_bytes(tensors))
    for stem, fill_folder in snapshot.folders.items():
        (temp / stem).mkdir()
        fill_folder(temp / stem)
        for path in sorted((temp / stem).rglob("*")):
            name = path.relative_to(temp).as_posix()
            if path.is_file():
                if not re.search(FILE_NAME, name):
                    raise ValueError(f"{name} cannot be part of a checkpoint")
                if path.suffix == ".safetensors":
                    check_finite(load_file(path), name)
                files.append(FileEntry(name, path.stat().st_size, hash_file(path)))
            fsync_path(path)
        fsync_path(temp / stem)
    for name, data in documents.items():
        add(name, data)
    files.sort(key=lambda entry: entry.name)
    manifest = Manifest("dragkit-checkpoint", 1, step, files)
    write_durably(temp / MANIFEST_NAME, encode_json(msgspec.to_builtins(manifest)))
    fsync_path(temp)


def load_checkpoint(folder: Path, *, device: str = "cpu") -> LoadedCheckpoint:
    """Verifies one checkpoint and reads its safetensors and JSON files.

    Args:
        folder: what `find_checkpoint` returned; device: where the tensors go.

    Returns:
        The contents; sub-folders such as `adapter/` are verified and left to their own readers.

    Raises:
        CheckpointError: damaged, or a file is not what its name says.
        MissingInputError: no such folder.
        DataError: the path is a file, such as a pickle.
    """
    folder = Path(folder)
    require_folder(folder)
    tensors: dict[str, dict[str, Tensor]] = {}
    documents: dict[str, object] = {}
    for path in (folder / entry.name for entry in verify_checkpoint(folder).files):
        try:
            if path.parent != folder:
                continue
            if path.suffix == ".safetensors":
                tensors[path.stem] = load_file(path, device=device)
            elif path.suffix == ".json":
                documents[path.stem] = read_json(path, _JSON_TYPES.get(path.name, object))
        except (CheckpointError, SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be loaded ({error})") from error
    state = documents.pop("state", None)
    if not isinstance(state, TrainState) or step_of_folder(folder.name) not in (None, state.step):
        raise CheckpointError(f"{folder}: state.json is missing or of another step")
    return LoadedCheckpoint(tensors, state, documents, folder)
