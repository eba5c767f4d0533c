"""Damaged, forged and foreign checkpoints: all are found out, none is read as something else."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dragkit.errors import CheckpointError, DataError
from dragkit.trainer import atomic
from dragkit.trainer.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    verify_checkpoint,
)
from dragkit.trainer.manifest import hash_file
from tests.trainer.checkpoint_cases import FILES, StateAt


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "sync", lambda descriptor: None)


Damage = Callable[[Path, Path], None]


def _flip(path: Path, _: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(1).randrange(len(data))] ^= 4
    path.write_bytes(data)


def _link_away(path: Path) -> None:
    """The right content, but outside of the checkpoint."""
    outside = path.parents[path.parent.name == "adapter"].parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


DAMAGES: dict[str, Damage] = {
    "empty": lambda path, other: path.write_bytes(b""),
    "half": lambda path, other: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "last byte gone": lambda path, other: path.write_bytes(path.read_bytes()[:-1]),
    "one bit": _flip,
    "garbage": lambda path, other: path.write_bytes(
        random.Random(2).randbytes(path.stat().st_size)
    ),
    "removed": lambda path, other: path.unlink(),
    "from another step": lambda path, other: shutil.copy(other, path),
    "a link to the same content": lambda path, other: _link_away(path),
    "a folder": lambda path, other: (path.unlink(), path.mkdir()),
    "a pipe": lambda path, other: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, "MANIFEST.json"])
def test_damage_is_found_and_the_older_one_used(
    run: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture, state_at: StateAt
) -> None:
    DAMAGES[damage](run / "step-00000020" / name, run / "step-00000010" / name)
    with caplog.at_level(logging.WARNING):
        found = find_checkpoint(run)
    assert found == run / "step-00000010"
    assert load_checkpoint(found).state == state_at(10)
    assert "step-00000020" in caplog.text and name in caplog.text
    for loader in (find_checkpoint, load_checkpoint):
        with pytest.raises(CheckpointError, match=name):
            loader(run / "step-00000020")


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "MANIFEST.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _renamed(name: str) -> Callable[[dict], object]:
    return lambda manifest: manifest["files"][0].update(name=name)


MANIFEST_EDITS: dict[str, Callable[[dict], object]] = {
    **{
        repr(name): _renamed(name)
        for name in (
            *(
                "../step-00000010/state.json",
                "/etc/passwd.json",
                "adapter/../state.json",
                "./a.json",
            ),
            *(
                "C:\\a.json",
                "a\\b.json",
                "",
                "a.json\n",
                "a//b.json",
                "a\0.json",
                "x" * 300 + ".json",
            ),
            *("model.bin", "model.pt", "code.py", "~/a.json"),
        )
    },
    "no name": lambda manifest: manifest["files"][0].pop("name"),
    "name is a number": lambda manifest: manifest["files"][0].update(name=3),
    "negative size": lambda manifest: manifest["files"][0].update(size=-1),
    "size is true": lambda manifest: manifest["files"][0].update(size=True),
    "upper-case hash": lambda manifest: manifest["files"][0].update(sha256="A" * 64),
    "twice": lambda manifest: manifest["files"].append(manifest["files"][0]),
    "one too few": lambda manifest: manifest["files"].pop(),
    "none": lambda manifest: manifest["files"].clear(),
    "version": lambda manifest: manifest.update(version=2),
    "format": lambda manifest: manifest.update(format="other"),
    "step": lambda manifest: manifest.update(step=10),
    "step is text": lambda manifest: manifest.update(step="20"),
    "files is a dict": lambda manifest: manifest.update(files={}),
    "extra key": lambda manifest: manifest.update(more=1),
}


@pytest.mark.parametrize("edit", MANIFEST_EDITS)
def test_forged_manifests_are_refused(run: Path, edit: str) -> None:
    edit_manifest(run / "step-00000020", MANIFEST_EDITS[edit])
    assert find_checkpoint(run) == run / "step-00000010"


@pytest.mark.parametrize(
    "text",
    [b"", b"null", b"[]", b"\xff{}", b"[" * 100_000, b'{"a":1,"a":2}', b'{"a":NaN}', b"9" * 9999],
    ids=lambda text: repr(text[:12]),
)
def test_manifests_that_are_no_manifest(run: Path, text: bytes) -> None:
    (run / "step-00000020" / "MANIFEST.json").write_bytes(text)
    assert find_checkpoint(run) == run / "step-00000010"


def test_a_repeated_key_is_refused(run: Path) -> None:
    path = run / "step-00000020" / "MANIFEST.json"
    path.write_text(path.read_text().replace('"step": 20', '"step": 10, "step": 20'))
    with pytest.raises(CheckpointError, match="twice"):
        verify_checkpoint(path.parent)


def test_a_manifest_that_never_ends_is_not_read(run: Path) -> None:
    with open(run / "step-00000020" / "MANIFEST.json", "wb") as file:
        file.truncate(1 << 40)
    assert find_checkpoint(run) == run / "step-00000010"


def test_any_flipped_bit_of_the_manifest_is_found(run: Path) -> None:
    path = run / "step-00000020" / "MANIFEST.json"
    data = path.read_bytes()
    draw = random.Random(3)
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            verify_checkpoint(path.parent)
    path.write_bytes(data)
    verify_checkpoint(path.parent)


@pytest.mark.parametrize("name", ["notes.txt", "adapter/adapter_model.bin", "x.safetensors"])
def test_stray_files_are_refused_and_hidden_ones_reported(
    run: Path, name: str, caplog: pytest.LogCaptureFixture, state_at: StateAt
) -> None:
    (run / "step-00000020" / ".DS_Store").write_text("x")
    (run / "step-00000020" / ".sneaky.safetensors").write_text("x")
    assert load_checkpoint(find_checkpoint(run)).state == state_at(20)
    assert ".DS_Store" in caplog.text
    (run / "step-00000020" / name).write_text("x")
    assert find_checkpoint(run) == run / "step-00000010"


def test_links_to_folders_are_refused(run: Path) -> None:
    (run / "step-00000020" / "adapter").rename(run / "outside")
    (run / "step-00000020" / "adapter").symlink_to(run / "outside")
    assert find_checkpoint(run) == run / "step-00000010"


def test_parts_of_two_steps_do_not_mix(run: Path) -> None:
    shutil.rmtree(run / "step-00000020" / "adapter")
    shutil.copytree(run / "step-00000010" / "adapter", run / "step-00000020" / "adapter")
    assert find_checkpoint(run) == run / "step-00000010"
    shutil.rmtree(run / "step-00000020")
    shutil.copytree(run / "step-00000010", run / "step-00000020")
    with pytest.raises(CheckpointError, match="belongs to step 10"):
        find_checkpoint(run / "step-00000020")


def test_when_nothing_is_whole_every_reason_is_listed(run: Path) -> None:
    (run / "step-00000020" / "config.json").unlink()
    (run / "step-00000010" / "heads.safetensors").write_bytes(b"")
    (run / "step-00000010" / "state.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(run)
    text = str(caught.value)
    for part in (
        "config.json: missing",
        "heads.safetensors: 0 bytes, expected",
        "state.json: missing",
    ):
        assert part in text
    assert caught.value.exit_code == 66


def reseal(folder: Path) -> None:
    """Make the manifest agree with whatever the files hold now."""

    def update(manifest: dict) -> None:
        for row in manifest["files"]:
            row["size"] = (folder / row["name"]).stat().st_size
            row["sha256"] = hash_file(folder / row["name"])

    edit_manifest(folder, update)


def _safetensors(header: object, body: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def _row(begin: int, end: int, shape: tuple[int, ...] = (1,)) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        _safetensors({}, length=2**63),
        _safetensors({}, length=99_000_000),
        _safetensors({"a": _row(0, 4), "b": _row(2, 6)}),
        _safetensors({"a": _row(4, 8)}),
        _safetensors({"a": _row(0, 4)}),
        _safetensors({"a": _row(-4, 4, (2,))}),
        _safetensors({"a": _row(0, 8, (2**32, 2**32, 2))}),
        _safetensors({"a": {**_row(0, 8, (2,)), "dtype": "F64"}}),
        pickle.dumps({"a": 1}),
        b"",
    ],
    ids=[
        "huge",
        "long",
        "overlap",
        "hole",
        "short",
        "negative",
        "overflow",
        "dtype",
        "pickle",
        "empty",
    ],
)
def test_sealed_files_that_are_no_safetensors(run: Path, content: bytes) -> None:
    folder = run / "step-00000020"
    (folder / "heads.safetensors").write_bytes(content)
    reseal(folder)
    verify_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"heads\.safetensors"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"step": 21},
        {"epoch": -1},
        {"batch": 1.0},
        {"questions_seen": True},
        {"phase": None},
        {"best": "high"},
        {"extra": []},
        {"more": 1},
    ],
    ids=str,
)
def test_sealed_states_that_make_no_sense(run: Path, change: dict[str, object]) -> None:
    folder = run / "step-00000020"
    content = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**content, **change}))
    reseal(folder)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        load_checkpoint(folder)


class _Payload:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("name", ["model.pt", "model.PTH", "model.bin", "model.pkl", "model.ckpt"])
def test_pickles_are_refused_unread(tmp_path: Path, name: str) -> None:
    sentinel = tmp_path / "ran"
    folder = tmp_path / "old"
    folder.mkdir()
    for write in (
        lambda path: torch.save(_Payload(str(sentinel)), path),
        lambda path: torch.save(
            _Payload(str(sentinel)), path, _use_new_zipfile_serialization=False
        ),
        lambda path: path.write_bytes(pickle.dumps(_Payload(str(sentinel)))),
    ):
        write(folder / name)
        for call in (find_checkpoint, load_checkpoint):
            with pytest.raises(DataError, match="train phase 1 again") as caught:
                call(folder / name)
            assert caught.value.exit_code == 65
        with pytest.raises(DataError, match=name):
            find_checkpoint(folder)
    assert not sentinel.exists()
    with pytest.raises(FileExistsError):
        # The payload is live: unpickling it does make the folder.
        sentinel.mkdir()
        pickle.loads((folder / name).read_bytes())
