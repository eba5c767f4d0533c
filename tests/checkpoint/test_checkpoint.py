"""Checkpoints: round trip, search, retention."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dragkit.checkpoint.checkpoint import (
    Snapshot,
    find_checkpoint,
    load_checkpoint,
    mark_best,
    save_checkpoint,
    verify_checkpoint,
)
from dragkit.checkpoint.manifest import hash_file
from dragkit.errors import CheckpointError, DataError, MissingInputError
from tests.checkpoint.checkpoint_cases import FILES, bits, save_steps, snapshot_at, state_at

DTYPES = [
    *("bool", "uint8", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64"),
]


def steps_in(root: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in root.glob("step-*"))


def test_folder_layout_and_manifest(tmp_path: Path) -> None:
    root = tmp_path / "a" / "b"
    folder = save_checkpoint(root, 1200, snapshot_at(1200), state_at(1200))
    mark_best(root, 1200)
    assert folder == root / "step-00001200"
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == {*FILES, "MANIFEST.json"}
    rows = json.loads((folder / "MANIFEST.json").read_text())["files"]
    assert {row["name"] for row in rows} == set(FILES)
    for row in rows:
        assert row["size"] == (folder / row["name"]).stat().st_size
        assert row["sha256"] == hash_file(folder / row["name"])
    assert {p.name for p in root.iterdir()} == {"step-00001200", "latest", "best"}
    assert (root / "latest").read_text() == (root / "best").read_text() == "step-00001200\n"


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 4)], ids=str)
def test_every_dtype_is_restored_bit_for_bit(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {}
    for name in DTYPES:
        dtype = getattr(torch, name)
        raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
        # Clearing the second-highest bit of every byte removes NaN and infinity but keeps signs,
        # negative zeros and subnormals.
        raw &= 1 if name == "bool" else 0b10111111
        tensors[name] = raw.view(dtype).reshape(shape)
    folder = save_checkpoint(tmp_path, 1, Snapshot({"all": tensors}), state_at(1))
    loaded = load_checkpoint(folder).tensors["all"]
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(loaded[name]) == bits(tensor), name


def test_views_json_and_state_are_restored(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": base.t(), "row": base[1], "strided": base[:, ::2]}
    tensors["p"] = torch.nn.Parameter(torch.randn(4))
    extra = {"lr": 0.1 + 0.2, "text": "Zürich \u2028 \U0001f600", "deep": [None, True, {"k": [1]}]}
    state = state_at(5, best=None, extra=extra)
    documents = {"config": {"a": [1, 2.5, "x"], "seed": 2**70}, "listing": [1]}
    snapshot = Snapshot({"views": tensors, "none": {}}, json=documents)
    loaded = load_checkpoint(save_checkpoint(tmp_path, 5, snapshot, state))
    assert (loaded.state, loaded.json) == (state, documents)
    assert loaded.folder == tmp_path / "step-00000005" and loaded.tensors["none"] == {}
    for name, tensor in tensors.items():
        assert torch.equal(loaded.tensors["views"][name], tensor), name


def _adapter_with_nan(folder: Path) -> None:
    save_file({"lora_B": torch.tensor([1.0, float("nan")])}, folder / "a.safetensors")


@pytest.mark.parametrize(
    ("snapshot", "best", "named"),
    [
        (Snapshot({"heads": {"layer.w": torch.tensor([1.0, float("nan")])}}), 1.0, "layer.w"),
        (Snapshot({"heads": {"w": torch.tensor(float("inf")).bfloat16()}}), 1.0, "heads.*w"),
        (Snapshot(folders={"adapter": _adapter_with_nan}), 1.0, "lora_B"),
        (Snapshot(), float("nan"), "state.json"),
    ],
)
def test_nan_and_infinity_are_not_saved(
    run: Path, snapshot: Snapshot, best: float, named: str
) -> None:
    before = sorted(os.listdir(run))
    with pytest.raises(CheckpointError, match=named):
        save_checkpoint(run, 30, snapshot, state_at(30, best=best))
    assert sorted(os.listdir(run)) == before


@pytest.mark.parametrize(
    ("snapshot", "step", "keep"),
    [
        (Snapshot(), 2, 3),
        (Snapshot(), 1, 0),
        (Snapshot(json={"state": {}}), 1, 3),
        (Snapshot(json={"MANIFEST": {}}), 1, 3),
        (Snapshot(json={"a/b": 1}), 1, 3),
        (Snapshot(tensors={"../heads": {}}), 1, 3),
        (Snapshot(folders={"adapter": lambda folder: (folder / "m.bin").touch()}), 1, 3),
    ],
)
def test_wrong_arguments_are_refused(
    tmp_path: Path, snapshot: Snapshot, step: int, keep: int
) -> None:
    with pytest.raises(ValueError):
        save_checkpoint(tmp_path, step, snapshot, state_at(1), keep=keep)
    assert os.listdir(tmp_path) == []


def test_a_failing_writer_leaves_nothing(run: Path) -> None:
    def adapter(folder: Path) -> None:
        (folder / "half.json").write_text("{")
        raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        save_checkpoint(run, 30, Snapshot(folders={"adapter": adapter}), state_at(30))
    assert steps_in(run) == [10, 20]


def test_missing_checkpoints_and_files_are_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", tmp_path / "absent" / "step-00000010"):
        with pytest.raises(MissingInputError, match="Expected") as caught:
            find_checkpoint(path)
        assert caught.value.exit_code == 66
    with pytest.raises(MissingInputError, match="best"):
        find_checkpoint(tmp_path, "best")
    for call in (find_checkpoint, load_checkpoint):
        # No file is opened, so a pickle is refused like any file.
        (tmp_path / "model.pt").write_bytes(b"\x80\x04")
        with pytest.raises(DataError, match=r"is a folder.*train phase 1 again") as caught:
            call(tmp_path / "model.pt")
        assert caught.value.exit_code == 65
    with pytest.raises(ValueError):
        find_checkpoint(tmp_path, "newest")


def test_the_newest_has_the_highest_step_whatever_its_time(tmp_path: Path) -> None:
    save_steps(tmp_path, 99_999_999, 100_000_000, 20, keep=5)
    for age, step in enumerate((20, 99_999_999, 100_000_000)):
        os.utime(tmp_path / f"step-{step:08d}", (10**9 - age, 10**9 - age))
    assert find_checkpoint(tmp_path) == tmp_path / "step-100000000"


def test_best_and_latest(tmp_path: Path) -> None:
    save_steps(tmp_path, 10)
    save_steps(tmp_path, 20, is_best=True)
    save_steps(tmp_path, 30)
    best, latest = tmp_path / "step-00000020", tmp_path / "step-00000030"
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path / "latest") == latest
    assert find_checkpoint(tmp_path, "best") == find_checkpoint(tmp_path / "best") == best
    (best / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        find_checkpoint(tmp_path, "best")
    shutil.rmtree(best)
    with pytest.raises(CheckpointError, match=r"step-00000020(.|\n)*missing"):
        find_checkpoint(tmp_path, "best")


@pytest.mark.parametrize("text", ["../run/step-00000010", "/etc", "", "step-10", "\xff"])
def test_pointers_outside_the_run_are_refused(run: Path, text: str) -> None:
    (run / "best").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match="best"):
        find_checkpoint(run, "best")
    # Without a readable pointer any checkpoint may be the best, so none is removed.
    save_steps(run, 30, keep=1)
    assert steps_in(run) == [10, 20, 30]


def test_symlinked_folders_and_renamed_copies_load(run: Path) -> None:
    disk, link = run.parent / "disk", run.parent / "link"
    link.symlink_to(run)
    disk.mkdir()
    shutil.move(run / "step-00000020", disk)
    (run / "step-00000020").symlink_to(disk / "step-00000020")
    shutil.move(run / "step-00000010" / "adapter", disk)
    (run / "step-00000010" / "adapter").symlink_to(disk / "adapter")
    assert load_checkpoint(find_checkpoint(link)).state == state_at(20)
    assert load_checkpoint(link / "step-00000010").state == state_at(10)
    save_steps(link, 30, keep=1, is_best=True)
    assert set(os.listdir(run)) == {"step-00000030", "latest", "best"}
    assert (disk / "step-00000020" / "state.json").exists()
    shutil.copytree(run / "step-00000030", run.parent / "final")
    assert load_checkpoint(find_checkpoint(run.parent / "final")).state == state_at(30)


@pytest.mark.parametrize("suffix", ["", "-99999999"], ids=["suffix", "suffix of earlier versions"])
def test_leftovers_of_dead_writers_are_removed_at_the_next_save(run: Path, suffix: str) -> None:
    shutil.copytree(run / "step-00000020", run / f"step-00000040.tmp{suffix}")
    (run / f"latest.tmp{suffix}").write_text("x")
    (run / "step-00000050.tmp-notes").mkdir()
    (run / "step-00000010").rename(run / f"step-00000010.old{suffix}")
    shutil.copytree(run / "step-00000020", run / f"step-00000020.old{suffix}")
    before = set(os.listdir(run))
    assert find_checkpoint(run) == run / "step-00000020"
    assert load_checkpoint(run / f"step-00000010.old{suffix}").state == state_at(10)
    assert set(os.listdir(run)) == before, "a reader changes nothing"
    save_steps(run, 30)
    remaining = {
        "step-00000010",
        "step-00000020",
        "step-00000030",
        "latest",
        "step-00000050.tmp-notes",
    }
    assert set(os.listdir(run)) == remaining


def test_an_old_copy_is_restored_if_its_replacement_is_damaged(run: Path) -> None:
    old = run / "step-00000020.old"
    shutil.copytree(run / "step-00000020", old)
    (run / "step-00000020" / "state.json").unlink()
    shutil.copytree(old, run / "step-00000020.tmp")
    assert find_checkpoint(run) == old and load_checkpoint(old).state == state_at(20)
    save_steps(run, 5)
    assert load_checkpoint(run / "step-00000020").state == state_at(20) and not old.exists()


def test_the_last_intact_checkpoints_and_the_best_stay(tmp_path: Path) -> None:
    for step in range(10, 90, 10):
        save_steps(tmp_path, step, is_best=step == 30)
    assert steps_in(tmp_path) == [30, 60, 70, 80]
    (tmp_path / "step-00000080" / "state.json").unlink()
    save_steps(tmp_path, 90)
    assert steps_in(tmp_path) == [30, 60, 70, 80, 90], "a damaged checkpoint does not count"
    save_steps(tmp_path, 5, keep=2)
    assert steps_in(tmp_path) == [5, 30, 70, 80, 90], "the new checkpoint stays"
    save_steps(tmp_path, 100, is_best=True, keep=1)
    assert steps_in(tmp_path) == [30, 100], "the best before this save stays until the next"
    save_steps(tmp_path, 110, keep=1)
    assert steps_in(tmp_path) == [100, 110]


def test_failed_removals_do_not_stop_a_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    draw = random.Random(4)

    def unreliable(action: Callable[..., object]) -> Callable[..., object]:
        def call(path: Path, *rest: Path, **options: object) -> object:
            if (not rest or Path(rest[0]).name.endswith(".tmp")) and draw.random() < 0.3:
                raise PermissionError(13, "Permission denied", str(path))
            result = action(path, *rest, **options)
            if (tmp_path / "latest").exists():
                # After the first save an intact checkpoint exists at every moment.
                verify_checkpoint(max(p for p in tmp_path.glob("step-*") if "." not in p.name))
            return result

        return call

    monkeypatch.setattr(shutil, "rmtree", unreliable(shutil.rmtree))
    monkeypatch.setattr(os, "replace", unreliable(os.replace))
    for step in range(1, 41):
        save_steps(tmp_path, step, keep=2)
        assert load_checkpoint(find_checkpoint(tmp_path)).state == state_at(step)
    assert "could not be removed" in caplog.text
    monkeypatch.undo()
    save_steps(tmp_path, 50, keep=2)
    assert steps_in(tmp_path) == [40, 50]
