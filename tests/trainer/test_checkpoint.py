"""Checkpoints: round trip, strictness, damage, retention, search."""

from __future__ import annotations

import dataclasses
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
from safetensors.torch import save_file
from torch import Tensor

from dragkit.errors import CheckpointError, DataError, MissingInputError, WriteError
from dragkit.trainer import atomic
from dragkit.trainer.checkpoint import (
    Snapshot,
    TrainState,
    find_checkpoint,
    flatten_optimizer_state,
    load_checkpoint,
    load_tensors_into,
    restore_optimizer_state,
    save_checkpoint,
    verify_checkpoint,
)
from dragkit.trainer.manifest import hash_file

DEAD_PID = 99_999_999
FILES = (
    "heads.safetensors",
    "optim.safetensors",
    "state.json",
    "config.json",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "sync", lambda descriptor: None)


def state_at(step: int, **changes: object) -> TrainState:
    state = TrainState("joint", 1, step, 7, 8 * step, 0.1 + step, {"lr": 1e-4, "hash": "ab"})
    return dataclasses.replace(state, **changes)


def snapshot_at(step: int) -> Snapshot:
    def adapter(folder: Path) -> None:
        (folder / "adapter_config.json").write_text(f'{{"r": {step}}}')
        save_file({"lora_A": torch.full((2, 3), float(step))}, folder / "adapter_model.safetensors")

    return Snapshot(
        tensors={
            "heads": {"w": torch.full((3, 4), float(step)), "b": torch.tensor(step)},
            "optim": {"w/exp_avg": torch.full((3, 4), -float(step))},
        },
        folders={"adapter": adapter},
        json={"config": {"seed": step}},
    )


def save_steps(root: Path, *steps: int, **options: object) -> None:
    for step in steps:
        save_checkpoint(root, step, snapshot_at(step), state_at(step), **options)


def steps_in(root: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in root.glob("step-*"))


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two") / "run"
    save_steps(root, 10, 20)
    return root


@pytest.fixture
def run(two_saved: Path, tmp_path: Path) -> Path:
    """A copy of a run with checkpoints at steps 10 and 20."""
    shutil.copytree(two_saved, tmp_path / "run")
    return tmp_path / "run"


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# ---------------------------------------------------------------------------- round trip


def test_folder_layout_and_manifest(tmp_path: Path) -> None:
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
def test_every_dtype_returns_bit_for_bit(tmp_path: Path, shape: tuple[int, ...]) -> None:
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
            # Clearing the second-highest bit of every byte leaves no NaN or infinity; signs, negative
            # zeros and subnormals remain.
            raw &= 0b10111111
        tensors[name] = raw.view(dtype).reshape(shape)
    folder = save_checkpoint(tmp_path, 1, Snapshot({"all": tensors}), state_at(1))
    loaded = load_checkpoint(folder).tensors["all"]
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(loaded[name]) == bits(tensor), name


def test_views_shared_memory_gradients_and_no_tensors(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tied = torch.nn.Parameter(torch.randn(4))
    tensors = {"t": base.t(), "row": base[1], "strided": base[:, ::2], "a": tied, "b": tied}
    parts = Snapshot({"views": tensors, "none": {}})
    loaded = load_checkpoint(save_checkpoint(tmp_path, 0, parts, state_at(0))).tensors
    assert loaded["none"] == {}
    for name, tensor in tensors.items():
        assert torch.equal(loaded["views"][name], tensor), name


def test_state_and_json_return(tmp_path: Path) -> None:
    extra = {"lr": 0.1 + 0.2, "text": "Zürich \u2028 \U0001f600", "deep": [None, True, {"k": [1]}]}
    state = state_at(5, best=None, extra=extra)
    parts = Snapshot(json={"config": {"a": [1, 2.5, "x"]}, "listing": [1]})
    loaded = load_checkpoint(save_checkpoint(tmp_path, 5, parts, state))
    assert loaded.state == state
    assert loaded.json == {"config": {"a": [1, 2.5, "x"]}, "listing": [1]}
    assert loaded.folder == tmp_path / "step-00000005"


def test_a_copy_under_another_name_loads(run: Path) -> None:
    shutil.copytree(run / "step-00000020", run.parent / "final")
    assert load_checkpoint(find_checkpoint(run.parent / "final")).state == state_at(20)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_values_that_are_not_finite_are_not_saved(
    run: Path, value: float, dtype: torch.dtype
) -> None:
    bad = torch.zeros(9)
    bad[4] = value
    parts = Snapshot({"heads": {"fine": torch.ones(2), "layer.w": bad.to(dtype)}})
    before = sorted(os.listdir(run))
    with pytest.raises(CheckpointError, match=r"heads\.safetensors.*layer\.w"):
        save_checkpoint(run, 30, parts, state_at(30))
    assert sorted(os.listdir(run)) == before


def test_adapters_and_states_that_are_not_finite_are_not_saved(run: Path) -> None:
    def adapter(folder: Path) -> None:
        save_file({"lora_B": torch.tensor([1.0, float("nan")])}, folder / "a.safetensors")

    before = sorted(os.listdir(run))
    with pytest.raises(CheckpointError, match="lora_B"):
        save_checkpoint(run, 30, Snapshot(folders={"adapter": adapter}), state_at(30))
    with pytest.raises(CheckpointError, match=r"state\.json"):
        save_checkpoint(run, 30, Snapshot(), state_at(30, best=float("nan")))
    assert sorted(os.listdir(run)) == before


def test_arguments_that_cannot_be_saved(tmp_path: Path) -> None:
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


def test_a_writer_that_breaks_leaves_nothing(run: Path) -> None:
    def adapter(folder: Path) -> None:
        (folder / "half.json").write_text("{")
        raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        save_checkpoint(run, 30, Snapshot(folders={"adapter": adapter}), state_at(30))
    assert steps_in(run) == [10, 20]


def test_too_little_space_is_known_before_writing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "free_bytes", lambda path: 1000)
    monkeypatch.setattr(atomic, "make_folder", lambda path: pytest.fail("a folder was made"))
    with pytest.raises(WriteError) as caught:
        save_checkpoint(run, 30, snapshot_at(30), state_at(30))
    for part in ("step-00000030", "needs 1,0", "1,000 bytes are free", str(run / "step-00000020")):
        assert part in str(caught.value)


# ---------------------------------------------------------------------------- damage

Damage = Callable[[Path, Path], None]


def _flip(path: Path, _: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(1).randrange(len(data))] ^= 4
    path.write_bytes(data)


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
    "a link to itself": lambda path, other: (path.unlink(), path.symlink_to(other.resolve())),
    "a folder": lambda path, other: (path.unlink(), path.mkdir()),
    "a pipe": lambda path, other: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, "MANIFEST.json"])
def test_damage_is_found_and_the_older_one_used(
    run: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
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
    run: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "step-00000020" / ".DS_Store").write_text("x")
    (run / "step-00000020" / ".sneaky.safetensors").write_text("x")
    assert load_checkpoint(find_checkpoint(run)).state == state_at(20)
    assert ".DS_Store" in caplog.text
    (run / "step-00000020" / name).write_text("x")
    assert find_checkpoint(run) == run / "step-00000010"


def test_links_to_folders_are_refused(run: Path) -> None:
    shutil.rmtree(run / "step-00000020" / "adapter")
    (run / "step-00000020" / "adapter").symlink_to(run / "step-00000010" / "adapter")
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


# ---------------------------------------------------------------------------- hostile contents


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


# ---------------------------------------------------------------------------- search


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


def test_newest_goes_by_step_and_not_by_time(tmp_path: Path) -> None:
    save_steps(tmp_path, 99_999_999, 100_000_000, 20, keep=5)
    for age, step in enumerate((20, 99_999_999, 100_000_000)):
        os.utime(tmp_path / f"step-{step:08d}", (10**9 - age, 10**9 - age))
    assert find_checkpoint(tmp_path) == tmp_path / "step-100000000"


def test_best_latest_and_a_run_folder(tmp_path: Path) -> None:
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
def test_pointers_that_lead_elsewhere(run: Path, text: str) -> None:
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


def test_an_old_copy_stays_while_its_replacement_is_damaged(run: Path) -> None:
    old = run / f"step-00000020.old-{DEAD_PID}"
    shutil.copytree(run / "step-00000020", old)
    (run / "step-00000020" / "state.json").unlink()
    assert find_checkpoint(run) == old
    assert load_checkpoint(old).state == state_at(20)


# ---------------------------------------------------------------------------- retention


def test_last_three_and_the_best_stay(tmp_path: Path) -> None:
    for step in range(10, 90, 10):
        save_steps(tmp_path, step, is_best=step == 30)
    assert steps_in(tmp_path) == [30, 60, 70, 80]
    save_steps(tmp_path, 90, is_best=True, keep=1)
    assert steps_in(tmp_path) == [90]


def test_a_save_below_the_highest_step_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_steps(tmp_path, 10, 20, 30, 5, keep=2)
    assert steps_in(tmp_path) == [5, 20, 30]
    assert "not the highest" in caplog.text


def test_cut_checkpoints_do_not_count(run: Path) -> None:
    (run / "step-00000020" / "state.json").unlink()
    save_steps(run, 30, keep=2)
    assert steps_in(run) == [10, 20, 30]
    save_steps(run, 40, keep=2)
    assert steps_in(run) == [30, 40]


def test_failed_removals_never_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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


# ---------------------------------------------------------------------------- strict loading


def test_tensors_go_into_a_module_strictly() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    own = model.state_dict()
    new = {name: torch.randn_like(t) if t.is_floating_point() else t + 5 for name, t in own.items()}
    load_tensors_into(own, new, what="heads")
    assert all(torch.equal(model.state_dict()[name], new[name]) for name in new)

    wrong = {**new, "0.weight": torch.zeros(3, 4), "extra.x": torch.zeros(7)}
    wrong["1.num_batches_tracked"] = torch.tensor(1.5)
    del wrong["0.bias"]
    before = {name: tensor.clone() for name, tensor in own.items()}
    with pytest.raises(CheckpointError) as caught:
        load_tensors_into(own, wrong, what="heads")
    text = str(caught.value)
    for part in (
        "heads",
        "0.bias [3]",
        "extra.x [7]",
        "0.weight",
        "[3, 2]",
        "[3, 4]",
        "num_batches",
    ):
        assert part in text
    assert all(torch.equal(own[name], before[name]) for name in own)


def _model_and_optimizer(amsgrad: bool) -> tuple[list[str], list[Tensor], torch.optim.AdamW]:
    torch.manual_seed(1)
    named = {
        "a.w": torch.randn(3, 2),
        "unused": torch.randn(2),
        "scale": torch.randn(()),
        "half": torch.randn(2, 2).bfloat16(),
    }
    parameters = [tensor.requires_grad_() for tensor in named.values()]
    groups = [{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "lr": 0.01}]
    return list(named), parameters, torch.optim.AdamW(groups, amsgrad=amsgrad)


def _train(parameters: list[Tensor], optimizer: torch.optim.Optimizer, steps: range) -> None:
    w, _, scale, half = parameters
    for step in steps:
        optimizer.zero_grad()
        ((w * scale * (step + 1)).square().sum() + half.float().pow(3).sum()).backward()
        optimizer.step()


@pytest.mark.parametrize("amsgrad", [False, True])
def test_an_optimizer_goes_on_bit_for_bit(tmp_path: Path, amsgrad: bool) -> None:
    names, straight, optimizer = _model_and_optimizer(amsgrad)
    _train(straight, optimizer, range(6))

    names, parameters, optimizer = _model_and_optimizer(amsgrad)
    _train(parameters, optimizer, range(3))
    parts = Snapshot(
        {
            "heads": dict(zip(names, parameters, strict=True)),
            "optim": flatten_optimizer_state(optimizer, names),
        }
    )
    loaded = load_checkpoint(save_checkpoint(tmp_path, 3, parts, state_at(3))).tensors
    keys = {"a.w/exp_avg", "a.w/exp_avg_sq", "a.w/step", "unused/fresh"}
    assert keys <= loaded["optim"].keys()

    names, resumed, optimizer = _model_and_optimizer(amsgrad)
    _train(resumed, optimizer, range(1))
    own = dict(zip(names, (p.detach() for p in resumed), strict=True))
    load_tensors_into(own, loaded["heads"], what="heads")
    restore_optimizer_state(optimizer, names, loaded["optim"])
    again = flatten_optimizer_state(optimizer, names)
    assert again.keys() == parts.tensors["optim"].keys()
    assert all(bits(again[name]) == bits(parts.tensors["optim"][name]) for name in again)
    _train(resumed, optimizer, range(3, 6))
    for one, other in zip(straight, resumed, strict=True):
        assert bits(one.detach()) == bits(other.detach())


def test_an_optimizer_state_that_does_not_fit() -> None:
    names, parameters, optimizer = _model_and_optimizer(False)
    _train(parameters, optimizer, range(2))
    good = flatten_optimizer_state(optimizer, names)
    before = {name: tensor.clone() for name, tensor in good.items()}
    bad = {**good, "a.w/exp_avg": torch.zeros(2, 3), "gone/step": torch.tensor(1.0)}
    del bad["scale/step"], bad["unused/fresh"]
    with pytest.raises(CheckpointError) as caught:
        restore_optimizer_state(optimizer, names, bad)
    for part in ("a.w/exp_avg", "[2, 3]", "[3, 2]", "gone/step", "scale/step", "unused/exp_avg_sq"):
        assert part in str(caught.value)
    again = flatten_optimizer_state(optimizer, names)
    assert all(torch.equal(again[name], before[name]) for name in before)
    for wrong in (names[:-1], ["a.w"] * 4):
        with pytest.raises(ValueError):
            flatten_optimizer_state(optimizer, wrong)
        with pytest.raises(ValueError):
            restore_optimizer_state(optimizer, wrong, good)
