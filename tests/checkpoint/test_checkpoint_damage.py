"""Damaged and foreign checkpoints are detected and never loaded."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest

from dragkit.checkpoint.checkpoint import find_checkpoint, load_checkpoint, verify_checkpoint
from dragkit.errors import CheckpointError
from dragkit.selftest.damages import (
    DAMAGES,
    MANIFEST_EDITS,
    MANIFEST_TEXTS,
    OUTSIDE_NAMES,
    UNLISTED_NAMES,
    edit_manifest,
    list_outside,
    rewrite_manifest,
)
from tests.checkpoint.checkpoint_cases import FILES, state_at


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, "MANIFEST.json"])
def test_damage_is_detected_and_the_older_checkpoint_is_used(
    run: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGES[damage](run / "step-00000020" / name, run / "step-00000010" / name)
    with caplog.at_level(logging.WARNING):
        folder = find_checkpoint(run)
    assert folder == run / "step-00000010"
    assert load_checkpoint(folder).state == state_at(10)
    assert "step-00000020" in caplog.text and name in caplog.text
    for loader in (find_checkpoint, load_checkpoint):
        with pytest.raises(CheckpointError, match=name):
            loader(run / "step-00000020")


@pytest.mark.parametrize("name", OUTSIDE_NAMES)
def test_names_outside_the_folder_are_refused(run: Path, name: str) -> None:
    folder = run / "step-00000020"
    list_outside(run, folder, name)
    with pytest.raises(CheckpointError, match="name"):
        find_checkpoint(folder)


@pytest.mark.parametrize("edit", MANIFEST_EDITS)
def test_manifests_with_wrong_entries_are_refused(run: Path, edit: str) -> None:
    edit_manifest(run / "step-00000020", MANIFEST_EDITS[edit])
    assert find_checkpoint(run) == run / "step-00000010"


@pytest.mark.parametrize("text", [b"", *MANIFEST_TEXTS], ids=len)
def test_manifests_of_another_form_are_refused(run: Path, text: bytes) -> None:
    (run / "step-00000020" / "MANIFEST.json").write_bytes(text)
    assert find_checkpoint(run) == run / "step-00000010"


def test_any_flipped_bit_of_the_manifest_is_detected(run: Path) -> None:
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


@pytest.mark.parametrize("name", UNLISTED_NAMES)
def test_unlisted_files_are_refused_and_hidden_files_ignored(run: Path, name: str) -> None:
    (run / "step-00000020" / ".DS_Store").write_text("x")
    assert load_checkpoint(find_checkpoint(run)).state == state_at(20)
    (run / "step-00000020" / name).write_text("x")
    assert find_checkpoint(run) == run / "step-00000010"


def test_parts_of_two_steps_are_refused(run: Path) -> None:
    shutil.rmtree(run / "step-00000020" / "adapter")
    shutil.copytree(run / "step-00000010" / "adapter", run / "step-00000020" / "adapter")
    assert find_checkpoint(run) == run / "step-00000010"
    shutil.rmtree(run / "step-00000020")
    shutil.copytree(run / "step-00000010", run / "step-00000020")
    with pytest.raises(CheckpointError, match="belongs to step 10"):
        find_checkpoint(run / "step-00000020")


def test_without_an_intact_checkpoint_every_reason_is_listed(run: Path) -> None:
    (run / "step-00000020" / "config.json").unlink()
    (run / "step-00000010" / "heads.safetensors").write_bytes(b"")
    (run / "step-00000010" / "state.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(run)
    reasons = (
        "config.json: missing",
        "heads.safetensors: 0 bytes, expected",
        "state.json: missing",
    )
    assert all(reason in str(caught.value) for reason in reasons)
    assert caught.value.exit_code == 66


class _Payload:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("content", ["pickle", "empty"])
def test_a_listed_file_that_is_not_safetensors_is_refused(
    run: Path, tmp_path: Path, content: str
) -> None:
    folder, ran = run / "step-00000020", tmp_path / "ran"
    data = pickle.dumps(_Payload(str(ran))) if content == "pickle" else b""
    (folder / "heads.safetensors").write_bytes(data)
    rewrite_manifest(folder)
    verify_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"heads\.safetensors"):
        load_checkpoint(folder)
    assert not ran.exists()
    if content == "pickle":
        pickle.loads(data)
        assert ran.exists(), "loading the pickle must run its payload"


@pytest.mark.parametrize(
    "change",
    [{"step": 21}, {"epoch": -1}, {"questions_seen": True}, {"phase": None}, {"best": "high"}],
    ids=str,
)
def test_a_listed_state_with_wrong_values_is_refused(run: Path, change: dict[str, object]) -> None:
    folder = run / "step-00000020"
    content = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**content, **change}))
    rewrite_manifest(folder)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        load_checkpoint(folder)


def test_a_manifest_of_a_newer_version_says_so(run: Path) -> None:
    edit_manifest(run / "step-00000020", lambda manifest: manifest.update(version=7, new="key"))
    with pytest.raises(CheckpointError, match="in format 7, .* reads format 1. Update dragkit"):
        find_checkpoint(run / "step-00000020")
