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
from torch import Tensor

from dragkit.errors import CheckpointError, DataError, MissingInputError, WriteError
from dragkit.trainer import atomic
from dragkit.trainer.checkpoint import (
    Snapshot,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from dragkit.trainer.manifest import hash_file
from tests.trainer.checkpoint_cases import FILES, SaveSteps, SnapshotAt, StateAt

DEAD_PID = 99_999_999


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "sync", lambda descriptor: None)


def steps_in(root: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in root.glob("step-*"))


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_folder_layout_and_manifest(
    tmp_path: Path, state_at: StateAt, snapshot_at: SnapshotAt
) -> None:
    folder = save_checkpoint(
        tmp_path / "a" / "b", 1200, snapshot_at(1200), state_at(1200), is_best=True
    )
    assert folder == tmp_path / "a" / "b" / "step-00001200"
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == {*FILES, "MANIFEST.json"}
    rows = json.loads((folder / "MANIFEST.json").read_text())["files"]
    assert {row["name"] for row in rows} == set(FILES)
    for row in rows:
        assert row["size"] == (folder / row["name"]).stat().st_size
        assert row["sha256"] == hash_file(folder / row["name"])
    assert (folder.parent / "latest").read_text() == "step-00001200\n"
    assert (folder.parent / "best").read_text() == "step-00001200\n"
    assert {p.name for p in folder.parent.iterdir()} == {"step-00001200", "latest", "best"}


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)], ids=str)
def test_every_dtype_returns_bit_for_bit(
    tmp_path: Path, shape: tuple[int, ...], state_at: StateAt
) -> None:
    names = [
        "bool",
        "uint8",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "complex64",
        "float8_e4m3fn",
        "float8_e5m2",
    ]
    tensors = {}
    for name in names:
        dtype = getattr(torch, name)
        size = torch.empty((), dtype=dtype).itemsize
        raw = torch.randint(0, 256, (*shape, size), dtype=torch.uint8)
        if name == "bool":
            raw &= 1
        elif dtype.is_floating_point or dtype.is_complex:
            # Clearing the second-highest bit of every byte leaves no NaN or infinity; signs,
            # negative zeros and subnormals remain.
            raw &= 0b10111111
        tensors[name] = raw.view(dtype).reshape(shape)
    folder = save_checkpoint(tmp_path, 1, Snapshot({"all": tensors}), state_at(1))
    loaded = load_checkpoint(folder).tensors["all"]
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(loaded[name]) == bits(tensor), name


def test_views_shared_memory_gradients_and_no_tensors(tmp_path: Path, state_at: StateAt) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tied = torch.nn.Parameter(torch.randn(4))
    tensors = {"t": base.t(), "row": base[1], "strided": base[:, ::2], "a": tied, "b": tied}
    parts = Snapshot({"views": tensors, "none": {}})
    loaded = load_checkpoint(save_checkpoint(tmp_path, 0, parts, state_at(0))).tensors
    assert loaded["none"] == {}
    for name, tensor in tensors.items():
        assert torch.equal(loaded["views"][name], tensor), name


def test_state_and_json_return(tmp_path: Path, state_at: StateAt) -> None:
    extra = {"lr": 0.1 + 0.2, "text": "Zürich \u2028 \U0001f600", "deep": [None, True, {"k": [1]}]}
    state = state_at(5, best=None, extra=extra)
    parts = Snapshot(json={"config": {"a": [1, 2.5, "x"]}, "listing": [1]})
    loaded = load_checkpoint(save_checkpoint(tmp_path, 5, parts, state))
    assert loaded.state == state
    assert loaded.json == {"config": {"a": [1, 2.5, "x"]}, "listing": [1]}
    assert loaded.folder == tmp_path / "step-00000005"


def test_a_copy_under_another_name_loads(run: Path, state_at: StateAt) -> None:
    shutil.copytree(run / "step-00000020", run.parent / "final")
    assert load_checkpoint(find_checkpoint(run.parent / "final")).state == state_at(20)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_values_that_are_not_finite_are_not_saved(
    run: Path, value: float, dtype: torch.dtype, state_at: StateAt
) -> None:
    bad = torch.zeros(9)
    bad[4] = value
    parts = Snapshot({"heads": {"fine": torch.ones(2), "layer.w": bad.to(dtype)}})
    before = sorted(os.listdir(run))
    with pytest.raises(CheckpointError, match=r"heads\.safetensors.*layer\.w"):
        save_checkpoint(run, 30, parts, state_at(30))
    assert sorted(os.listdir(run)) == before


def test_adapters_and_states_that_are_not_finite_are_not_saved(
    run: Path, state_at: StateAt
) -> None:
    def adapter(folder: Path) -> None:
        save_file({"lora_B": torch.tensor([1.0, float("nan")])}, folder / "a.safetensors")

    before = sorted(os.listdir(run))
    with pytest.raises(CheckpointError, match="lora_B"):
        save_checkpoint(run, 30, Snapshot(folders={"adapter": adapter}), state_at(30))
    with pytest.raises(CheckpointError, match=r"state\.json"):
        save_checkpoint(run, 30, Snapshot(), state_at(30, best=float("nan")))
    assert sorted(os.listdir(run)) == before


def test_arguments_that_cannot_be_saved(tmp_path: Path, state_at: StateAt) -> None:
    def wrong(parts: Snapshot, step: int = 1, keep: int = 3) -> None:
        with pytest.raises(ValueError):
            save_checkpoint(tmp_path / "run", step, parts, state_at(1), keep=keep)

    wrong(Snapshot(), step=2)
    wrong(Snapshot(), keep=0)
    wrong(Snapshot(json={"state": {}}))
    wrong(Snapshot(json={"MANIFEST": {}}))
    wrong(Snapshot(tensors={"../heads": {}}))
    wrong(Snapshot(json={"a/b": 1}))
    wrong(Snapshot(json={"big": "x" * (17 << 20)}))
    assert not (tmp_path / "run").exists()
    wrong(Snapshot(folders={"adapter": lambda folder: (folder / "m.bin").touch()}))
    wrong(Snapshot(folders={"adapter": lambda folder: (folder / "m.json").symlink_to("/etc")}))
    assert os.listdir(tmp_path / "run") == []


def test_a_writer_that_breaks_leaves_nothing(run: Path, state_at: StateAt) -> None:
    def adapter(folder: Path) -> None:
        (folder / "half.json").write_text("{")
        raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        save_checkpoint(run, 30, Snapshot(folders={"adapter": adapter}), state_at(30))
    assert steps_in(run) == [10, 20]


def test_too_little_space_is_known_before_writing(
    run: Path, monkeypatch: pytest.MonkeyPatch, state_at: StateAt, snapshot_at: SnapshotAt
) -> None:
    monkeypatch.setattr(atomic, "free_bytes", lambda path: 1000)
    monkeypatch.setattr(atomic, "make_folder", lambda path: pytest.fail("a folder was made"))
    with pytest.raises(WriteError) as caught:
        save_checkpoint(run, 30, snapshot_at(30), state_at(30))
    for part in ("step-00000030", "needs 1,0", "1,000 bytes are free", str(run / "step-00000020")):
        assert part in str(caught.value)


def test_nothing_to_find(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", tmp_path / "absent" / "step-00000010"):
        with pytest.raises(MissingInputError, match="expected") as caught:
            find_checkpoint(path)
        assert caught.value.exit_code == 66
    with pytest.raises(MissingInputError, match="best"):
        find_checkpoint(tmp_path, "best")
    (tmp_path / "file.json").write_text("{}")
    with pytest.raises(DataError, match="is a folder"):
        find_checkpoint(tmp_path / "file.json")
    with pytest.raises(ValueError):
        find_checkpoint(tmp_path, "newest")


def test_newest_goes_by_step_and_not_by_time(tmp_path: Path, save_steps: SaveSteps) -> None:
    save_steps(tmp_path, 99_999_999, 100_000_000, 20, keep=5)
    for age, step in enumerate((20, 99_999_999, 100_000_000)):
        os.utime(tmp_path / f"step-{step:08d}", (10**9 - age, 10**9 - age))
    assert find_checkpoint(tmp_path) == tmp_path / "step-100000000"


def test_best_latest_and_a_run_folder(tmp_path: Path, save_steps: SaveSteps) -> None:
    root = tmp_path / "checkpoints"
    save_steps(root, 10)
    save_steps(root, 20, is_best=True)
    save_steps(root, 30)
    for path in (tmp_path, root):
        assert find_checkpoint(path) == root / "step-00000030"
        assert find_checkpoint(path, "best") == root / "step-00000020"
    assert find_checkpoint(root / "best") == root / "step-00000020"
    assert find_checkpoint(root / "latest") == root / "step-00000030"
    (root / "step-00000020" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        find_checkpoint(root, "best")


@pytest.mark.parametrize("text", ["../run/step-00000010", "/etc", "", "step-10", "\xff", "x" * 999])
def test_pointers_that_lead_elsewhere(run: Path, text: str, save_steps: SaveSteps) -> None:
    (run / "best").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match="best"):
        find_checkpoint(run, "best")
    # An unreadable pointer may hide which one is the best, so nothing is removed.
    save_steps(run, 30, keep=1)
    assert steps_in(run) == [10, 20, 30]


def test_leftovers_of_dead_writers_go_and_of_live_ones_stay(run: Path) -> None:
    shutil.copytree(run / "step-00000020", run / f"step-00000030.tmp-{DEAD_PID}")
    (run / f"latest.tmp-{DEAD_PID}").write_text("x")
    (run / f"step-00000030.tmp-{os.getppid()}").mkdir()
    (run / "step-00000040.tmp-notes").mkdir()
    (run / "step-00000010").rename(run / f"step-00000010.old-{DEAD_PID}")
    shutil.copytree(run / "step-00000020", run / f"step-00000020.old-{DEAD_PID}")
    assert find_checkpoint(run) == run / "step-00000020"
    kept = {f"step-00000030.tmp-{os.getppid()}", "step-00000040.tmp-notes"}
    assert set(os.listdir(run)) == {"step-00000010", "step-00000020", "latest", *kept}


def test_an_old_copy_stays_while_its_replacement_is_damaged(run: Path, state_at: StateAt) -> None:
    old = run / f"step-00000020.old-{DEAD_PID}"
    shutil.copytree(run / "step-00000020", old)
    old = old.rename(run / f"step-00000020.old-{os.getppid()}")
    assert find_checkpoint(run) == run / "step-00000020"
    (run / "step-00000020" / "state.json").unlink()
    assert find_checkpoint(run) == old
    old = old.rename(run / f"step-00000020.old-{DEAD_PID}")
    assert find_checkpoint(run) == old
    assert load_checkpoint(old).state == state_at(20)


def test_last_three_and_the_best_stay(tmp_path: Path, save_steps: SaveSteps) -> None:
    for step in range(10, 90, 10):
        save_steps(tmp_path, step, is_best=step == 30)
    assert steps_in(tmp_path) == [30, 60, 70, 80]
    save_steps(tmp_path, 90, is_best=True, keep=1)
    assert steps_in(tmp_path) == [90]


def test_a_save_below_the_highest_step_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, save_steps: SaveSteps
) -> None:
    save_steps(tmp_path, 10, 20, 30, 5, keep=2)
    assert steps_in(tmp_path) == [5, 20, 30]
    assert "not the highest" in caplog.text


def test_cut_checkpoints_do_not_count(run: Path, save_steps: SaveSteps) -> None:
    (run / "step-00000020" / "state.json").unlink()
    save_steps(run, 30, keep=2)
    assert steps_in(run) == [10, 20, 30]
    save_steps(run, 40, keep=2)
    assert steps_in(run) == [30, 40]


def test_failed_removals_never_stop_a_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    state_at: StateAt,
    save_steps: SaveSteps,
) -> None:
    draw = random.Random(4)

    def unreliable(action: Callable[..., object]) -> Callable[..., object]:
        def call(path: Path, *rest: Path) -> object:
            removal = not rest or ".tmp-" in rest[0].name
            if removal and draw.random() < 0.3:
                raise PermissionError(13, "Permission denied", str(path))
            found = action(path, *rest)
            if any(tmp_path.glob("latest")):
                # At every instant after the first save, something whole is there.
                newest = max(p for p in tmp_path.glob("step-*") if "." not in p.name)
                verify_checkpoint(newest)
            return found

        return call

    for name in ("unlink", "rmdir", "rename"):
        monkeypatch.setattr(atomic, name, unreliable(getattr(atomic, name)))
    for step in range(1, 41):
        save_steps(tmp_path, step, keep=2)
        assert load_checkpoint(find_checkpoint(tmp_path)).state == state_at(step)
    assert "could not be removed" in caplog.text
    monkeypatch.undo()
    save_steps(tmp_path, 50, keep=2)
    assert steps_in(tmp_path) == [40, 50]
