"""Saves, validations and logs on a disk that fails."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from dragkit.checkpoint.checkpoint import find_checkpoint, load_checkpoint
from dragkit.errors import (
    WriteError,
)
from dragkit.eval.report import Report
from dragkit.trainer import loop, results_table
from dragkit.trainer.loop import Trainer
from dragkit.trainer.phase1 import RetrieverPhase
from dragkit.trainer.progress import MetricsLog
from dragkit.trainer.resume import resolve_checkpoint
from tests.trainer.run_cases import (
    FIXTURE,
    assert_same,
    logged,
    make_run,
    resume_alone,
    shown,
)

VAL = {"data.val_heuristics_path": str(FIXTURE)}


def test_an_epoch_is_saved_before_its_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Trainer) -> Report:
        raise ValueError("validation fails")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="validation fails"):
        patch.setattr(Trainer, "validate", fail)
        make_run(tmp_path, 1, **VAL).execute()
    assert load_checkpoint(find_checkpoint(tmp_path / "run")).state.epoch == 1
    make_run(tmp_path, 1, "whole", **VAL).execute()
    resume_alone(tmp_path / "run").execute()
    assert_same(tmp_path / "whole", tmp_path / "run")
    assert [shown(line) for line in logged(tmp_path / "run")] == [
        shown(line) for line in logged(tmp_path / "whole")
    ]


@pytest.mark.parametrize(("failing", "best"), [((), 2), ((2,), 4), ((2, 4), 3), ((1, 2, 4), 3)])
def test_the_best_is_the_best_of_those_that_were_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: tuple[int, ...], best: int
) -> None:
    scores, save = iter((0.1, 0.9, 0.4, 0.5)), loop.save_checkpoint

    def unreliable(root: Path, step: int, *args: object, **options: object) -> Path:
        if step // 3 in failing:
            raise WriteError("disk full")
        return save(root, step, *args, **options)

    monkeypatch.setattr(loop, "save_checkpoint", unreliable)
    monkeypatch.setattr(RetrieverPhase, "score", lambda self, means: next(scores))
    run = make_run(tmp_path, 1, **VAL, **{"optim.epochs": 4})
    if 4 in failing:
        # The weights of the last step are nowhere.
        with pytest.raises(WriteError, match="disk full"):
            run.execute()
    else:
        run.execute()
    marked = load_checkpoint(resolve_checkpoint(tmp_path / "run", "best"))
    assert marked.state.epoch == best


def test_lines_wait_for_a_disk_that_is_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = MetricsLog(tmp_path, enabled=True)
    path = tmp_path / "metrics.jsonl"
    with metrics:
        metrics.append(1, {"train": {}})
        path.rename(tmp_path / "kept")
        path.symlink_to("/dev/full")
        for step in (2, 3):
            metrics.append(step, {"train": {}})
        path.unlink()
        (tmp_path / "kept").rename(path)
        metrics.append(4, {"train": {}})
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3, 4]
    assert caplog.text.count("its lines wait") == 1
    with metrics:
        path.unlink()
        path.symlink_to("/dev/full")
        metrics.append(5, {"train": {}})
    assert "the last 1 lines are lost" in caplog.text


def test_dropping_keeps_whole_lines_up_to_the_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "train": {}}, {"step": 2, "train": {}}, {"step": 2, "validation": {}}]
    lines += [{"step": 3, "train": {}}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1, "tr')
    with path.open("ab") as file:
        file.write(b"\0\0\xff\n[]\n")
    MetricsLog(tmp_path, enabled=True).drop_after(2)
    assert logged(tmp_path) == lines[:2]


def test_results_that_cannot_be_written_end_with_74_after_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(results_table, "write_text_atomically", full)
    settings = {"optim.epochs": 1, "data.test_heuristics_path": str(FIXTURE)}
    with pytest.raises(WriteError, match="results.json: cannot be written .*No space") as caught:
        make_run(tmp_path, 1, **settings).execute()
    assert "after phase 1" in str(caught.value) and caught.value.exit_code == 74
    assert load_checkpoint(find_checkpoint(tmp_path / "run")).state.step == 3
