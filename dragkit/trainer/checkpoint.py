"""Checkpoints: a folder per step that is either complete or not there.

A folder is written under a temporary name, its manifest last, and renamed when everything is on the
disk; `latest` and `best` are repointed after that, and old folders removed after that. Only
safetensors and JSON are ever parsed.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dragkit.errors import CheckpointError, WriteError
from dragkit.trainer import atomic
from dragkit.trainer.folders import (
    commit,
    find_checkpoint,
    last_good,
    refuse_non_folder,
    retain,
    tidy,
    verify_or_explain,
)
from dragkit.trainer.lock import RunInUseError, RunLock
from dragkit.trainer.manifest import (
    MANIFEST_NAME,
    MAX_JSON_BYTES,
    FileEntry,
    Manifest,
    encode_json,
    encode_manifest,
    hash_file,
    list_files,
    name_problem,
    read_json,
    step_of_folder,
    verify_checkpoint,
)
from dragkit.trainer.tensors import (
    check_file_finite,
    check_finite,
    flatten_optimizer_state,
    load_tensors_into,
    restore_optimizer_state,
    tensor_bytes,
)

__all__ = [
    "JSON",
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

logger = logging.getLogger(__name__)

JSON: TypeAlias = "None | bool | int | float | str | list[JSON] | dict[str, JSON]"

_STEM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
_SPACE_MARGIN_BYTES = 1 << 20


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
    epoch: int
    step: int
    batch: int
    questions_seen: int
    best: float | None = None
    extra: dict[str, JSON] = field(default_factory=dict)


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
    """Write `<root>/step-<n>/` so that a crash at any instant leaves the old or the new, whole.

    Saves to one root do not overlap: hold a `RunLock`, and save from one thread at a time.

    Args:
        root: folder of the run's checkpoints; made if absent.
        step: optimizer step, equal to `state.step`; a checkpoint of that step is replaced.
        snapshot: contents.
        state: position of the run, written as `state.json`.
        keep: newest checkpoints that stay, at least 1; the best stays too.
        is_best: point `best` at this checkpoint.

    Returns:
        The new folder.

    Raises:
        CheckpointError: a value is not finite; nothing is written.
        WriteError: the disk is full or fails; nothing is left of the attempt, older ones stay.
        ValueError: arguments that contradict each other or names that cannot be used.
    """
    documents = _encode_documents(step, snapshot, state, keep)
    for stem, tensors in snapshot.tensors.items():
        check_finite(tensors, f"{stem}.safetensors")
    root = Path(root)
    final = root / f"step-{step:08d}"
    temp = root / f"{final.name}.tmp-{os.getpid()}"
    needed = 0
    try:
        atomic.make_folders(root)
        tidy(root, before_save=True)
        needed = _estimate_bytes(root, snapshot, documents)
        if atomic.free_bytes(root) < needed:
            raise _write_error(root, final, needed, "not enough free space")
        _fill(temp, step, snapshot, documents)
        commit(temp, final)
    except BaseException as error:
        atomic.remove_quietly(temp)
        if isinstance(error, (OSError, SafetensorError)):
            raise _write_error(root, final, needed, str(error)) from error
        raise
    try:
        atomic.replace_text(root / "latest", f"{final.name}\n")
        if is_best:
            atomic.replace_text(root / "best", f"{final.name}\n")
    except OSError as error:
        raise WriteError(
            f"{final}: saved, but 'latest' or 'best' in {root} could not be pointed at it ({error})"
        ) from error
    retain(root, final, keep)
    return final


def _encode_documents(
    step: int, snapshot: Snapshot, state: TrainState, keep: int
) -> dict[str, bytes]:
    """Check the arguments of a save and encode its JSON files."""
    if step < 0 or state.step != step or keep < 1:
        raise ValueError(f"step {step}, state.step {state.step}, keep {keep} do not go together")
    documents: dict[str, bytes] = {}
    for stem, content in {**snapshot.json, "state": dataclasses.asdict(state)}.items():
        try:
            documents[f"{stem}.json"] = encode_json(content)
        except ValueError as error:
            raise CheckpointError(f"{stem}.json: not saved, {error}") from error
        if len(documents[f"{stem}.json"]) > MAX_JSON_BYTES:
            raise ValueError(f"{stem}.json: more than {MAX_JSON_BYTES} bytes of JSON")
    for stem in (*snapshot.json, *snapshot.tensors, *snapshot.folders):
        if not _STEM.fullmatch(stem):
            raise ValueError(f"{stem!r} cannot be the name of a part of a checkpoint")
    if "state" in snapshot.json or MANIFEST_NAME in documents:
        raise ValueError("'state' and 'MANIFEST' are written by save_checkpoint itself")
    return documents


def _estimate_bytes(root: Path, snapshot: Snapshot, documents: dict[str, bytes]) -> int:
    """Bytes that a save will need; folders are taken to be as large as in the last checkpoint."""
    tensors = [tensor for group in snapshot.tensors.values() for tensor in group.values()]
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    total += sum(len(document) for document in documents.values())
    last = last_good(root)
    for folder in snapshot.folders:
        if last is not None and (last / folder).is_dir():
            total += sum(list_files(last / folder)[0].values())
    return total + _SPACE_MARGIN_BYTES


def _write_error(root: Path, final: Path, needed: int, reason: str) -> WriteError:
    """The message of a save that failed: what, where, how much space, what is still good."""
    try:
        free = f"{atomic.free_bytes(root):,}"
        last = last_good(root)
    except OSError:
        free, last = "an unknown number of", None
    good = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
    return WriteError(
        f"{final}: checkpoint not saved ({reason}); needs {needed:,} bytes, {free} bytes are free; "
        f"{good}; free some space or choose another checkpoint folder"
    )


def _fill(temp: Path, step: int, snapshot: Snapshot, documents: dict[str, bytes]) -> None:
    """Write all files of a checkpoint into a new folder, the manifest last; wait for the disk."""
    atomic.make_folder(temp)
    files: list[FileEntry] = []
    for stem, tensors in snapshot.tensors.items():
        data = tensor_bytes(tensors)
        name = f"{stem}.safetensors"
        files.append(FileEntry(name, len(data), atomic.write_file(temp / name, data)))
    for stem, fill_folder in snapshot.folders.items():
        atomic.make_folder(temp / stem)
        fill_folder(temp / stem)
        sizes, odd = list_files(temp / stem)
        for name in (*sizes, *odd):
            if name in odd or name_problem(f"{stem}/{name}"):
                raise ValueError(f"{stem}/{name} cannot be part of a checkpoint")
        for name, size in sizes.items():
            path = temp / stem / name
            if path.suffix == ".safetensors":
                check_file_finite(path)
            atomic.sync_path(path)
            files.append(FileEntry(f"{stem}/{name}", size, hash_file(path)))
        for folder in (*(temp / stem).rglob("*/"), temp / stem):
            if folder.is_dir():
                atomic.sync_path(folder)
    for name, data in documents.items():
        files.append(FileEntry(name, len(data), atomic.write_file(temp / name, data)))
    atomic.write_file(temp / MANIFEST_NAME, encode_manifest(Manifest(step, tuple(files))))
    atomic.sync_path(temp)


def load_checkpoint(folder: Path, *, device: str = "cpu") -> LoadedCheckpoint:
    """Verify one checkpoint and read its safetensors and JSON files.

    Args:
        folder: what `find_checkpoint` returned.
        device: where the tensors go.

    Returns:
        The contents; sub-folders such as `adapter/` are verified and left to their own readers.

    Raises:
        CheckpointError: damaged, or a file is not what its name says.
        MissingInputError: no such folder.
        DataError: the path is a file, such as a pickle.
    """
    folder = Path(folder)
    refuse_non_folder(folder)
    names = [entry.name for entry in verify_or_explain(folder).files if "/" not in entry.name]
    tensors: dict[str, dict[str, Tensor]] = {}
    documents: dict[str, object] = {}
    for name in names:
        path = folder / name
        try:
            if path.suffix == ".safetensors":
                tensors[path.stem] = load_file(path, device=device)
            elif path.suffix == ".json":
                documents[path.stem] = read_json(path)
        except (CheckpointError, SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be loaded ({error})") from error
    state = _parse_state(folder, documents.pop("state", None))
    return LoadedCheckpoint(tensors, state, documents, folder)


def _parse_state(folder: Path, content: object) -> TrainState:
    """`state.json` as a `TrainState`, every field checked."""
    fields = {item.name for item in dataclasses.fields(TrainState)}
    if not isinstance(content, dict) or set(content) != fields:
        raise CheckpointError(f"{folder}: state.json needs exactly {', '.join(sorted(fields))}")
    counts = ("epoch", "step", "batch", "questions_seen")
    wrong = [key for key in counts if type(content[key]) is not int or content[key] < 0]
    wrong += [] if isinstance(content["phase"], str) else ["phase"]
    wrong += [] if isinstance(content["extra"], dict) else ["extra"]
    best = content["best"]
    if best is not None and (type(best) not in (int, float) or not math.isfinite(best)):
        wrong.append("best")
    if wrong or step_of_folder(folder.name) not in (None, content["step"]):
        raise CheckpointError(
            f"{folder}: state.json has wrong values in {', '.join(wrong or ['step'])}"
        )
    return TrainState(**content)
