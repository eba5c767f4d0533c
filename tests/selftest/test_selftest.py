"""The self-test sees losses and says them. Its payloads run in a careless reader."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

from dragkit.checkpoint import checkpoint, retention
from dragkit.data import question_file, question_row
from dragkit.errors import DataError, WriteError
from dragkit.selftest import __main__ as program
from dragkit.selftest import bombs, checks, ops, privacy, saves, toy
from dragkit.selftest.bad_lines import bad_lines
from dragkit.selftest.damages import damages
from dragkit.selftest.failing_disks import failing_disks, kept_checkpoints
from dragkit.selftest.faulty_disk import FaultyDisk
from dragkit.selftest.hostile import FALSE_TENSORS, payload, payload_files
from dragkit.selftest.ops import op_errors
from dragkit.selftest.outcome import Loss, Outcome, require
from dragkit.selftest.page import page
from dragkit.selftest.refusals import false_tensors
from dragkit.selftest.resumes import phase_changes, resumes
from dragkit.selftest.saves import crash_points, disk_errors, save_case
from dragkit.selftest.stops import closed_logs, kills, stops, stops_anywhere
from dragkit.selftest.surroundings import failing_disk, variables
from dragkit.selftest.toy import logged_steps, require_same, trace


def run(check: Callable[..., None], *arguments: object, **options: object) -> Outcome:
    outcome = Outcome("x")
    check(outcome, *arguments, **options)
    return outcome


def test_nothing_is_lost_without_a_fault_in_the_package(tmp_path: Path) -> None:
    for check, tried in ((crash_points, 300), (disk_errors, 150), (damages, 90)):
        outcome = run(check)
        assert outcome.losses == [] and outcome.tried >= tried, check
    assert run(bad_lines, tmp_path, corruptions=20, long_line=0).losses == []
    assert run(kept_checkpoints, saves=20).losses == []
    assert run(false_tensors).losses == []
    outcome = run(bombs.bombs, tmp_path, digits=1_000_000)
    assert outcome.losses == [] and outcome.tried == 30


def test_a_writer_that_is_not_atomic_is_seen() -> None:
    def in_place(temp: Path, final: Path) -> None:
        if final.exists():
            shutil.rmtree(final)
        shutil.copytree(temp, final)
        fsync = os.open(final.parent, os.O_RDONLY)
        os.fsync(fsync)
        os.close(fsync)

    with mock.patch.object(checkpoint, "commit", in_place), save_case("next") as case:
        calls = FaultyDisk()
        case.run(calls)
        outcome = Outcome("x")
        for point in range(len(calls.calls)):
            with outcome.case(str(point)):
                case.crash(point, "kill")
    assert 0 < len(outcome.losses) < outcome.tried


def test_a_removal_in_place_is_seen() -> None:
    """Without the new name a checkpoint whose removal fails half-way would still be found."""

    def eager(root: Path, newest: Path, keep: int) -> None:
        for folder in root.glob("step-*"):
            if folder != newest or len(os.listdir(root)) > 5:
                shutil.rmtree(folder)

    with mock.patch.object(checkpoint, "prune", eager):
        assert run(kept_checkpoints, saves=20).losses


def test_surroundings_do_what_they_say(tmp_path: Path) -> None:
    names = [tmp_path / str(number) for number in range(5)]
    failed = []
    with failing_disk(errno.EIO, 1, 2):
        for path in names:
            try:
                checkpoint.write_durably(path, b"x")
            except OSError as error:
                failed.append((path.name, error.errno))
    assert failed == [("1", errno.EIO), ("2", errno.EIO)]
    checkpoint.write_durably(names[1], b"x")
    with variables({"DRAGKIT_X": "1"}):
        assert os.environ["DRAGKIT_X"] == "1"
    assert "DRAGKIT_X" not in os.environ
    script = """
import os, sys
from dragkit.selftest.surroundings import closed_log, file_limit
def write():
    open(sys.argv[1], "wb").write(b"123456")
with file_limit(5), closed_log((1,)):
    for action in (write, lambda: print("x", flush=True)):
        try:
            action()
        except OSError as error:
            print(error.strerror, file=sys.stderr)
os._exit(0)
"""
    told = subprocess.run([sys.executable, "-c", script, str(tmp_path / "f")], capture_output=True)
    assert b"Broken pipe" in told.stderr and (tmp_path / "f").stat().st_size <= 5


def test_a_commit_before_the_files_are_on_the_disk_is_seen() -> None:
    with mock.patch.object(checkpoint, "fsync_path", lambda path: None):
        outcome = Outcome("x")
        with outcome.case("all"):
            crash_points(outcome)
    assert "not fsynced" in outcome.losses[0]


def test_a_reader_that_checks_no_hashes_is_seen() -> None:
    verify = retention.verify_checkpoint
    with mock.patch.object(retention, "verify_checkpoint", lambda f, **_: verify(f, hashes=False)):
        assert any("bit" in loss for loss in run(damages).losses)


def test_a_silent_reader_of_questions_is_seen(tmp_path: Path) -> None:
    with mock.patch.object(question_file.QuestionReader, "_reject", lambda *_: None):
        outcome = run(bad_lines, tmp_path, corruptions=3, long_line=0)
    assert len(outcome.losses) >= 140


def test_readers_that_take_bombs_are_seen(tmp_path: Path) -> None:
    def careless(path: Path) -> None:
        time.sleep(0)

    def slow(path: Path) -> None:
        end = time.process_time() + 1.1
        while time.process_time() < end:
            pass
        raise DataError(f"{path}: no")

    def large(path: Path) -> None:
        bytearray(b"x") * 250_000_000
        raise DataError(f"{path}: no")

    def unnamed(path: Path) -> None:
        raise DataError("no")

    readers = (careless, "accepted"), (slow, "took 1"), (large, "MiB"), (unnamed, "names no file")
    for reader, loss in readers:
        outcome = Outcome("x")
        bombs._offer(outcome, "kind", "name", tmp_path / "file", b"", reader)
        assert loss in outcome.losses[0]
    with mock.patch.object(question_row, "unique_keys", dict):
        losses = run(bombs.bombs, tmp_path, digits=100_000).losses
    assert losses == [
        "questions: a key twice: accepted",
        "questions: a key twice, once in escapes: accepted",
    ]


def test_a_secret_and_a_lookup_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that write their environment down, and look a name up."""
    leak = tmp_path / "leak.py"
    leak.write_text(
        "import os, socket\n"
        "try: socket.getaddrinfo('example.invalid', 1)\n"
        "except OSError: pass\n"
        "print(os.environ.get('HF_TOKEN', ''), flush=True)\nraise SystemExit(0)\n"
    )

    def commands(root: Path, runs: Path) -> list[tuple[str, list[str]]]:
        return [("leak", [])]

    monkeypatch.syspath_prepend(str(tmp_path))
    with mock.patch.object(privacy, "_commands", commands):
        leaks = run(privacy.secrets, tmp_path).losses
        lookups = run(privacy.offline, tmp_path).losses
    assert any("HF_TOKEN" in loss and "log.txt" in loss for loss in leaks)
    assert lookups == [
        "names and connections: 1 were asked for, first ['getaddrinfo example.invalid']"
    ]


def test_a_wrong_op_and_one_that_gives_other_bits_are_seen() -> None:
    op, calls = ops.OPS["segment_sum"], []

    def wrong(x: list, o: object, backend: str) -> tuple:
        return tuple(1.001 * y for y in op(x, o, backend))

    def unsteady(x: list, o: object, backend: str) -> tuple:
        calls.append(1)
        return tuple(y + len(calls) * 1e-7 for y in op(x, o, backend))

    with mock.patch.dict(ops.OPS, {"segment_sum": op}, clear=True):
        assert run(op_errors, "torch").losses == []
    for fault in (wrong, unsteady):
        scaled = fault is wrong
        with mock.patch.dict(ops.OPS, {"segment_sum": fault}, clear=True):
            losses = run(op_errors, "torch").losses
        # In float64 a wrong op is equally wrong, so only an unsteady one differs from itself.
        assert bool(losses) != scaled


def test_the_planted_pickles_would_run(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    pickle.loads(payload(sentinel))
    assert sentinel.is_dir()
    files = {path.name: path for path in payload_files(tmp_path / "files", sentinel)}
    for name in ("archive.pt", "legacy.pt"):
        sentinel.rmdir()
        # The payload runs first, then the rest of the file is missing.
        with contextlib.suppress(EOFError, AttributeError):
            torch.load(files[name], weights_only=False)
        assert sentinel.is_dir(), name
    sentinel.rmdir()
    yaml.load(files["settings.yaml"].read_text(), Loader=yaml.UnsafeLoader)
    assert sentinel.is_dir()
    assert len(FALSE_TENSORS) >= 15


def test_two_runs_are_compared_by_hashes_and_logged_values(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    saves.save(folder, 10, 1.0)
    line = {"step": 10, "train": {"loss": 0.5}, "lr": 0.1, "questions_per_s": 3.0}
    log = folder / "metrics.jsonl"
    log.write_text(json.dumps(line) + "\n" + '{"step": 11')
    assert [row["step"] for row in logged_steps(folder)] == [10]
    expected = trace(folder)
    log.write_text(json.dumps(line | {"questions_per_s": 9.0}) + "\n")
    require_same(folder, expected)
    for other in (line | {"train": {"loss": 0.25}}, line | {"step": 9}):
        log.write_text(json.dumps(other) + "\n")
        with pytest.raises(Loss, match=r"metrics.jsonl:1"):
            require_same(folder, expected)
    log.write_text(2 * (json.dumps(line) + "\n"))
    with pytest.raises(Loss, match=r"1 files or lines differ.*metrics.jsonl:2"):
        require_same(folder, expected)
    saves.save(folder, 20, 2.0)
    with pytest.raises(Loss, match=r"differ from an uninterrupted run, first adapter"):
        require_same(folder, expected)


def test_questions_of_a_toy_are_the_same_each_time(tmp_path: Path) -> None:
    first = toy.write_questions(tmp_path / "a", 20)
    second = toy.write_questions(tmp_path / "b", 20)
    assert first.read_bytes() == second.read_bytes()
    rows = question_file.read_questions(first)
    assert len(rows.questions) == 20 and all(q.triples and q.paths for q in rows.questions)


def _lose(outcome: Outcome) -> None:
    with outcome.case("held"):
        pass
    with outcome.case("lost"):
        require(False, "a checkpoint\nwas lost")


def _fail(outcome: Outcome) -> None:
    raise OSError("no room")


@pytest.mark.parametrize(
    ("check", "code", "words"),
    [
        (lambda outcome: None, 0, "**no losses**"),
        (_lose, 1, "lost: a checkpoint was lost"),
        (_fail, 1, "preparation: OSError: no room"),
    ],
)
def test_the_page_and_the_exit_code_say_what_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Callable, code: int, words: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(checks, "checks", lambda tier, root: {"a check": check})
    report = tmp_path / "new" / "page.md"
    assert program.main(["--report", str(report)]) == code
    assert words in report.read_text()
    assert os.listdir(report.parent) == ["page.md"]


def test_a_page_that_cannot_be_written_is_known_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tried: list[int] = []
    monkeypatch.setattr(checks, "checks", lambda tier, root: {"x": lambda o: tried.append(1)})
    (tmp_path / "file").write_text("")
    code = program.main(["--report", str(tmp_path / "file" / "page.md")])
    assert code == WriteError.exit_code and not tried
    assert str(tmp_path / "file" / "page.md") in capsys.readouterr().err


def test_the_page_counts_what_has_not_ended() -> None:
    text = page("quick", [Outcome("one", tried=3)], skipped=["no GPU"], missing=2)
    assert "| one | 3 / 3 | 0 |" in text and "2 checks have not ended" in text
    assert "- no GPU" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_that_are_killed_stopped_and_resumed(tmp_path: Path) -> None:
    """The page of a full self-test covers more. This test sees that its machinery works."""
    for check, options in (
        (kills, {"count": 5, "epochs": 3}),
        (stops, {"count": 1, "epochs": 3}),
        (resumes, {"every": 20}),
        (closed_logs, {}),
        (phase_changes, {}),
        (failing_disks, {"count": 1}),
        (stops_anywhere, {"count": 1}),
    ):
        outcome = run(check, tmp_path, **options)
        assert outcome.tried >= 3 and outcome.losses == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_resumes_elsewhere_is_seen(tmp_path: Path) -> None:
    """Of two runs with another seed, one is offered as the resumed one."""
    runs = toy.Processes(tmp_path)
    short = toy.toy(tmp_path, 1, epochs=1, save_every=5)
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        runs.finish([*short.command(tmp_path / name), "--seed", seed])
    require_same(tmp_path / "b", trace(tmp_path / "a"))
    with pytest.raises(Loss, match="differ from an uninterrupted run"):
        require_same(tmp_path / "c", trace(tmp_path / "a"))
    with pytest.raises(Loss, match="exit code 2"):
        runs.finish(short.command(tmp_path / "a"))
