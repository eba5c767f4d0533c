"""Packing in parts: the same arrays for any parts, processes, kills and faults."""

from __future__ import annotations

import errno
import gzip
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from dragkit.data import cache, file_packing
from dragkit.data.cache import commit_folder
from dragkit.data.file_packing import pack_file
from dragkit.data.part_process import PartProcess
from dragkit.data.question_file import read_questions
from dragkit.errors import DataError, DragkitError, WriteError

_ONE_PART = 10**9


@pytest.fixture
def part_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the size of a part."""
    return lambda size: monkeypatch.setattr(file_packing, "_PART_BYTES", size)


def _pack(path: Path, target: Path, *, bad: float = 0.0, processes: int = 1) -> dict[str, bytes]:
    """The files of a packed folder but for the manifest, which lists them."""

    def fill(folder: Path) -> None:
        pack_file(
            path,
            folder,
            label_rule="auto",
            max_bad_fraction=bad,
            merge=True,
            processes=processes,
        )

    commit_folder(target, fill)
    assert [p.name for p in target.parent.iterdir() if p.name.startswith(".")] == []
    files = {p.name: p.read_bytes() for p in target.iterdir() if p.name != "manifest.json"}
    meta = json.loads(files.pop("meta.json"))
    return files | {"meta": json.dumps(meta, sort_keys=True).encode()}


@pytest.fixture
def rows(random_rows: Callable[..., list[dict]]) -> list[dict]:
    """Rows of which later ones use relations whose names sort before those of earlier ones."""
    made = random_rows(60, seed=3)
    for number, row in enumerate(made):
        row["triples"] = [[h, f"{r}.{(97 - number) // 7}", t] for h, r, t in row["triples"]]
        if number % 3 == 0:
            del row["id"]
    return made


@pytest.mark.parametrize("size, processes", [(1, 1), (700, 1), (5000, 1), (3000, 2)])
def test_parts_and_processes_change_nothing(
    size: int,
    processes: int,
    rows: list[dict],
    write_rows: Callable[..., Path],
    part_bytes: Callable[[int], None],
    tmp_path: Path,
) -> None:
    path = write_rows(rows)
    part_bytes(_ONE_PART)
    expected = _pack(path, tmp_path / "one" / "packed")
    assert len(expected) > 30
    part_bytes(size)
    assert _pack(path, tmp_path / "many" / "packed", processes=processes) == expected
    zipped = tmp_path / "rows.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert _pack(zipped, tmp_path / "zipped" / "packed") == expected


def _faulty(rows: list[dict]) -> list[dict | bytes]:
    """Rows with faults in many parts: two ids again and again, cut JSON, bytes, blank lines."""
    lines: list[dict | bytes] = [*rows]
    lines[1] = rows[1] | {"id": "same"}
    for number in (10, 11, 30, 59):
        lines[number] = rows[number] | {"id": "same"}
    lines[40] = rows[40] | {"id": rows[31]["id"]}
    lines[20], lines[25], lines[26], lines[50] = b'{"question": ', b"", b"  ", b'["\xff"]'
    return lines


def test_faults_in_all_parts_are_listed_as_one_pass_lists_them(
    rows: list[dict],
    write_rows: Callable[..., Path],
    part_bytes: Callable[[int], None],
    tmp_path: Path,
) -> None:
    path = write_rows(_faulty(rows))
    with pytest.raises(DataError) as one_pass:
        read_questions(path)
    assert str(one_pass.value).count("the same id as on line 2\n") == 4
    part_bytes(2000)
    for processes in (1, 2):
        with pytest.raises(DataError) as found:
            _pack(path, tmp_path / "cache" / "packed", processes=processes)
        assert str(found.value) == str(one_pass.value)
        # A refused file leaves nothing in the cache.
        assert list((tmp_path / "cache").iterdir()) == []


def test_the_accepted_fraction_counts_the_rows_of_all_parts(
    rows: list[dict],
    write_rows: Callable[..., Path],
    part_bytes: Callable[[int], None],
    tmp_path: Path,
) -> None:
    path = write_rows(_faulty(rows))
    part_bytes(_ONE_PART)
    expected = _pack(path, tmp_path / "one" / "packed", bad=0.2)
    summary = json.loads(expected["meta"])["summary"]
    assert (summary["rows"], summary["rejects"], summary["questions"]) == (58, 7, 51)
    part_bytes(2000)
    assert _pack(path, tmp_path / "many" / "packed", bad=0.2) == expected
    with pytest.raises(DataError):
        _pack(path, tmp_path / "many" / "other", bad=0.1)


def test_a_part_of_unusable_rows(
    rows: list[dict],
    write_rows: Callable[..., Path],
    part_bytes: Callable[[int], None],
    tmp_path: Path,
) -> None:
    path = write_rows([rows[0], *[b"{"] * 50, rows[1]])
    part_bytes(_ONE_PART)
    expected = _pack(path, tmp_path / "one" / "packed", bad=0.99)
    part_bytes(10)
    assert _pack(path, tmp_path / "many" / "packed", bad=0.99) == expected


def test_gzip_data_that_breaks_off_is_named_after_the_faults_before_it(
    rows: list[dict],
    write_rows: Callable[..., Path],
    part_bytes: Callable[[int], None],
    tmp_path: Path,
) -> None:
    path = write_rows([*rows[:20], b"{", *rows[20:]], "cut.jsonl")
    zipped = tmp_path / "cut.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes())[:-20])
    part_bytes(2000)
    with pytest.raises(DataError) as found:
        _pack(zipped, tmp_path / "cache" / "packed")
    first, second, _ = str(found.value).splitlines()
    assert ":21: $: not valid JSON" in first
    assert "the gzip data is truncated or damaged" in second


def _pack_slowly(path: Path, target: Path, processes: int, pids: object) -> None:
    """Packs, and waits for ever once some parts are finished."""
    file_packing._PART_BYTES = 2000
    add, start = file_packing._Parts._add, PartProcess.__init__

    def add_and_wait(self: object, block: object, meta: dict) -> None:
        add(self, block, meta)  # type: ignore[arg-type]
        if len(self.meta) >= 3:  # type: ignore[attr-defined]
            pids.put(None)  # type: ignore[attr-defined]
            time.sleep(60)

    def start_and_tell(self: PartProcess, job: object) -> None:
        start(self, job)  # type: ignore[arg-type]
        pids.put(self._process.pid)  # type: ignore[attr-defined]

    file_packing._Parts._add, PartProcess.__init__ = add_and_wait, start_and_tell  # type: ignore[method-assign]
    _pack(path, target, processes=processes)


def _has_ended(pid: int) -> bool:
    """Whether a process is gone, or is a zombie that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("processes", [1, 2])
def test_after_a_kill_the_finished_parts_are_used(
    processes: int,
    rows: list[dict],
    write_rows: Callable[..., Path],
    part_bytes: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, target = write_rows(rows), tmp_path / "cache" / "packed"
    part_bytes(_ONE_PART)
    expected = _pack(path, tmp_path / "one" / "packed")
    context = multiprocessing.get_context("fork")
    pids = context.Queue()
    builder = context.Process(target=_pack_slowly, args=(path, target, processes, pids))
    builder.start()
    workers = []
    while (pid := pids.get(timeout=120)) is not None:
        workers.append(pid)
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    assert len(workers) == (processes if processes > 1 else 0)
    assert not target.exists()
    deadline = time.monotonic() + 30
    while not all(map(_has_ended, workers)):
        assert time.monotonic() < deadline, "a process outlives the one that started it"
        time.sleep(0.05)
    part_bytes(2000)
    finished = [int(part.name) for part in tmp_path.glob("cache/.packed.building/parts-*/0*")]
    assert len(finished) >= 3
    packed = []
    pack_part = file_packing.pack_part

    def count(job: object, block: object, *args: object, **options: object) -> dict:
        packed.append(block.number)  # type: ignore[attr-defined]
        return pack_part(job, block, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(file_packing, "pack_part", count)
    assert _pack(path, target) == expected
    assert packed and sorted([*packed, *finished]) == list(range(len(packed) + len(finished)))


def test_after_ctrl_c_the_finished_parts_are_used_even_if_one_is_damaged(
    rows: list[dict],
    write_rows: Callable[..., Path],
    part_bytes: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, target = write_rows(rows), tmp_path / "cache" / "packed"
    part_bytes(_ONE_PART)
    expected = _pack(path, tmp_path / "one" / "packed")
    part_bytes(2000)
    packed = []
    pack_part = file_packing.pack_part

    def interrupted(job: object, block: object, *args: object, **options: object) -> dict:
        if len(packed) == 5:
            packed.clear()
            raise KeyboardInterrupt
        packed.append(block.number)  # type: ignore[attr-defined]
        return pack_part(job, block, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(file_packing, "pack_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _pack(path, target)
    assert not target.exists()
    (damaged,) = tmp_path.glob("cache/.packed.building/parts-*/000003/labels.npy")
    damaged.write_bytes(b"")
    monkeypatch.setattr(file_packing, "pack_part", pack_part)
    assert _pack(path, target) == expected


def test_two_builders_where_no_lock_works(
    rows: list[dict],
    write_rows: Callable[..., Path],
    part_bytes: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between machines a file system may have no locks. The faster one's folder is used."""
    path, target = write_rows(rows), tmp_path / "cache" / "packed"
    part_bytes(2000)
    expected = _pack(path, tmp_path / "one" / "packed")
    monkeypatch.setattr(cache, "_sole_builder", lambda target: nullcontext())
    pack_part = file_packing.pack_part
    numbers = []

    def overtaken(job: object, block: object, *args: object, **options: object) -> dict:
        numbers.append(block.number)  # type: ignore[attr-defined]
        if len(numbers) == 4:
            assert _pack(path, target) == expected
        return pack_part(job, block, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(file_packing, "pack_part", overtaken)
    assert _pack(path, target) == expected
    assert numbers[:4] == [0, 1, 2, 3] and numbers[4] == 3


def test_a_full_disk(
    rows: list[dict],
    write_rows: Callable[..., Path],
    part_bytes: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part_bytes(2000)
    pack_part = file_packing.pack_part

    def full(job: object, block: object, *args: object, **options: object) -> dict:
        if block.number == 4:  # type: ignore[attr-defined]
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pack_part(job, block, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(file_packing, "pack_part", full)
    with pytest.raises(WriteError, match="No space left") as error:
        _pack(write_rows(rows), tmp_path / "cache" / "packed")
    assert error.value.exit_code == 74
    assert list((tmp_path / "cache").iterdir()) == []


def _pack_with_little_room(path: Path, target: Path, results: object) -> None:
    file_packing._PART_BYTES = 2000
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
    try:
        _pack(path, target, processes=2)
    except WriteError as error:
        results.put(str(error))  # type: ignore[attr-defined]


def test_a_process_that_cannot_write_its_part(
    rows: list[dict], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    target = tmp_path / "cache" / "packed"
    builder = context.Process(
        target=_pack_with_little_room, args=(write_rows(rows), target, results)
    )
    builder.start()
    assert "File too large" in results.get(timeout=30)
    builder.join()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_process_that_is_killed_is_named(
    rows: list[dict],
    write_rows: Callable[..., Path],
    part_bytes: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part_bytes(2000)
    start = subprocess.Popen

    def start_and_kill(*args: object, **options: object) -> subprocess.Popen:
        process = start(*args, **options)  # type: ignore[call-overload]
        process.kill()
        return process

    monkeypatch.setattr(subprocess, "Popen", start_and_kill)
    with pytest.raises(DragkitError, match="ended with exit code -9"):
        _pack(write_rows(rows), tmp_path / "cache" / "packed", processes=2)
    assert list((tmp_path / "cache").iterdir()) == []
