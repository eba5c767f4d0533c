"""Damaged and foreign checkpoints: each is detected, and the next older one is used."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from dragkit.checkpoint.checkpoint import find_checkpoint, load_checkpoint
from dragkit.checkpoint.manifest import MANIFEST_NAME, hash_file
from dragkit.errors import CheckpointError
from dragkit.selftest.outcome import Outcome, require
from dragkit.selftest.saves import save, value_at

FILES = (
    *("heads.safetensors", "optim.safetensors", "state.json", "config.json"),
    *("adapter/adapter_config.json", "adapter/notes.md", MANIFEST_NAME),
)
_OLDER, _NEWER = "step-00000010", "step-00000020"
_MORE_BITS = (2, 3, 4)
_FUTURE_S = 2_000_000_000


def _flip(path: Path, seed: int) -> None:
    data, draw = bytearray(path.read_bytes()), random.Random(seed)
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _to_folder(path: Path, _: Path) -> None:
    path.unlink()
    path.mkdir()


# Each takes a file and the same file of another step.
DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "empty": lambda path, other: path.write_bytes(b""),
    "half": lambda path, other: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "last byte gone": lambda path, other: path.write_bytes(path.read_bytes()[:-1]),
    "one bit": lambda path, other: _flip(path, 1),
    "garbage": lambda path, other: path.write_bytes(
        random.Random(3).randbytes(path.stat().st_size)
    ),
    "removed": lambda path, other: path.unlink(),
    "from another step": lambda path, other: shutil.copy(other, path),
    "a folder": _to_folder,
}
MANIFEST_EDITS: dict[str, Callable[[dict], object]] = {
    "a pickle": lambda manifest: manifest["files"][0].update(name="model.bin"),
    "no name": lambda manifest: manifest["files"][0].pop("name"),
    "size is true": lambda manifest: manifest["files"][0].update(size=True),
    "one too few": lambda manifest: manifest["files"].pop(),
    "version": lambda manifest: manifest.update(version=2),
    "step": lambda manifest: manifest.update(step=10),
    "files is a dict": lambda manifest: manifest.update(files={}),
    "extra key": lambda manifest: manifest.update(more=1),
}
MANIFEST_TEXTS = (b"null", b"\xff{}", b"[" * 100_000, b'{"a":NaN}', b"9" * 100_000)
OUTSIDE_NAMES = ("../outside.json", "{run}/outside.json", "a/../../outside.json")
UNLISTED_NAMES = ("notes.txt", "adapter/adapter_model.bin", "x.safetensors")


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    """Changes the content of a checkpoint's manifest."""
    path = folder / MANIFEST_NAME
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite_manifest(folder: Path) -> None:
    """Updates a checkpoint's manifest to the present content of its files."""

    def update(manifest: dict) -> None:
        for row in manifest["files"]:
            row["size"] = (folder / row["name"]).stat().st_size
            row["sha256"] = hash_file(folder / row["name"])

    edit_manifest(folder, update)


def list_outside(run: Path, folder: Path, name: str) -> None:
    """Adds a file outside of a checkpoint to its manifest, with its size and hash."""
    outside = run / "outside.json"
    outside.write_text("{}")
    (folder / "a").mkdir()
    entry = {"name": name.format(run=run), "size": 2, "sha256": hash_file(outside)}
    edit_manifest(folder, lambda manifest: manifest["files"].append(entry))


def _flip_seeded(seed: int, path: Path, _: Path) -> None:
    _flip(path, seed)


def _damage(name: str, damage: Callable[[Path, Path], object], run: Path) -> None:
    damage(run / _NEWER / name, run / _OLDER / name)


def _mix_adapter(run: Path) -> None:
    shutil.rmtree(run / _NEWER / "adapter")
    shutil.copytree(run / _OLDER / "adapter", run / _NEWER / "adapter")


def _rename_older(run: Path) -> None:
    shutil.rmtree(run / _NEWER)
    shutil.copytree(run / _OLDER, run / _NEWER)


def all_damages() -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    """Yields a name, a part of the message, and a function that damages the newer checkpoint."""
    for name in FILES:
        for kind, damage in DAMAGES.items():
            yield f"{name}, {kind}", name, partial(_damage, name, damage)
        for seed in _MORE_BITS:
            # A manifest with another bit may name any file.
            yield f"{name}, bit {seed}", "", partial(_damage, name, partial(_flip_seeded, seed))
    for kind, change in MANIFEST_EDITS.items():
        yield f"manifest, {kind}", "", lambda run, c=change: edit_manifest(run / _NEWER, c)
    for text in MANIFEST_TEXTS:
        yield (
            f"manifest, {text[:9]!r}",
            MANIFEST_NAME,
            lambda run, text=text: (run / _NEWER / MANIFEST_NAME).write_bytes(text),
        )
    for outside in OUTSIDE_NAMES:
        yield f"manifest, {outside}", "", lambda run, n=outside: list_outside(run, run / _NEWER, n)
    for stray in UNLISTED_NAMES:
        yield f"unlisted {stray}", stray, lambda run, n=stray: (run / _NEWER / n).write_text("x")
    yield "adapter of another step", "adapter", _mix_adapter
    yield "a renamed checkpoint", "step 10", _rename_older


class _Warnings(logging.Handler):
    """Keeps the texts of warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"


@contextmanager
def _warnings() -> Iterator[_Warnings]:
    """Collects the package's warnings inside the block, in place of printing them."""
    logger, handler = logging.getLogger("dragkit"), _Warnings()
    logger.addHandler(handler)
    before, logger.propagate = logger.propagate, False
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def _require_fallback(run: Path, part: str) -> None:
    """The damaged newer checkpoint is named, refused, and replaced by the older one."""
    with _warnings() as warnings:
        found, value = find_checkpoint(run), value_at(run)
    require(found == run / _OLDER, f"{found.name} was taken")
    require(value == 1.0, f"the older checkpoint holds {value}")
    require(_NEWER in warnings.text and part in warnings.text, f"said was {warnings.text!r}")
    for loader in (find_checkpoint, load_checkpoint):
        try:
            loader(run / _NEWER)
        except CheckpointError as error:
            require(part in str(error), f"the message is {error}")
        else:
            require(False, "loaded by its name")


def _require_all_reasons(run: Path) -> None:
    """Without an intact checkpoint the error lists the reason of each."""
    (run / _NEWER / "config.json").unlink()
    (run / _OLDER / "state.json").unlink()
    try:
        with _warnings():
            find_checkpoint(run)
    except CheckpointError as error:
        require(error.exit_code == 66, f"exit code {error.exit_code}")
        for reason in ("config.json: missing", "state.json: missing"):
            require(reason in str(error), f"no word about {reason}")
    else:
        require(False, "a damaged checkpoint was taken")


def damages(outcome: Outcome) -> None:
    """Every file x every damage, manifests that were edited, stray files, mixed steps."""
    with tempfile.TemporaryDirectory() as folder:
        intact, run = Path(folder, "intact"), Path(folder, "run")
        save(intact, 10, 1.0)
        save(intact, 20, 2.0)

        def fresh() -> Path:
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(intact, run)
            return run

        for name, part, damage in all_damages():
            with outcome.case(name):
                damage(fresh())
                _require_fallback(run, part)
        for seed in range(5):
            with outcome.case(f"times of files in disorder, {seed}"):
                draw = random.Random(seed)
                for path in fresh().rglob("*"):
                    os.utime(path, (draw.randrange(_FUTURE_S), draw.randrange(_FUTURE_S)))
                os.utime(run / _OLDER, (_FUTURE_S, _FUTURE_S))
                require(value_at(run) == 2.0, "the newest checkpoint is not that of the last step")
        with outcome.case("no intact checkpoint"):
            _require_all_reasons(fresh())
