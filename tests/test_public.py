"""The public Python functions, on eight invented questions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dragkit
from dragkit.errors import ConfigError, MissingInputError
from tests.trainer.run_cases import FIXTURE, assert_same, make_run

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {
    "run.device": "cpu",
    "run.num_threads": 1,
    "data.heuristics_path": str(FIXTURE),
    "data.test_heuristics_path": str(FIXTURE),
    "generator.model": "tiny",
    "generator.max_new_tokens": 4,
    "retriever.hidden_dim": 16,
    "optim.batch_size": 4,
    "optim.epochs": 1,
}


def config(folder: Path, **overrides: object) -> dragkit.TrainConfig:
    values = SETTINGS | {"run.checkpoint_dir": str(folder)} | overrides
    return dragkit.load_config("tiny", overrides=values)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dragkit.TrainResult:
    return dragkit.train_run(config(tmp_path_factory.mktemp("run")))


def test_import_loads_no_torch_and_every_public_name_exists() -> None:
    code = "import sys, dragkit; dragkit.load_config(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    for name in dragkit.__all__:
        assert getattr(dragkit, name).__doc__
        assert name in dir(dragkit)
    with pytest.raises(AttributeError, match="has no attribute 'fit'"):
        dragkit.fit  # noqa: B018
    # Importing a program must not replace a public function.
    from dragkit import evaluate, train

    assert {train.__name__, evaluate.__name__}.isdisjoint(dragkit.__all__)


def test_load_config_takes_preset_file_and_overrides(tmp_path: Path) -> None:
    assert dragkit.load_config().preset == "tiny"
    file = tmp_path / "run.yaml"
    file.write_text("optim: {lr: 0.25, epochs: 3}\n")
    loaded = dragkit.load_config("cwq", file, {"optim.epochs": 4})
    assert (loaded.preset, loaded.optim.lr, loaded.optim.epochs) == ("cwq", 0.25, 4)
    with pytest.raises(ConfigError, match="optim.lrr"):
        dragkit.load_config(overrides={"optim.lrr": 1})


def test_train_run_trains_both_phases_and_returns_the_test_metrics(
    result: dragkit.TrainResult, tmp_path: Path
) -> None:
    assert result.checkpoint.parent == result.run_dir
    stages = ["untrained", "after phase 1 (cascade)", "after phase 2 (joint)"]
    assert list(result.metrics) == stages
    assert all(0 <= result.metrics[stage]["strict-f1"] <= 1 for stage in stages)
    # The command with the same settings trains the same weights.
    make_run(tmp_path, 2, "command", **SETTINGS, **{"optim.lr": 5e-4}).execute()
    own = config(tmp_path / "function", **{"optim.lr": 5e-4})
    phase1 = config(tmp_path / "function", **{"optim.lr": 5e-4, "run.phase": 1})
    dragkit.train_run(own, phase1)
    assert_same(tmp_path / "command", tmp_path / "function")


def test_phase_1_takes_the_presets_values_and_the_changed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Stop(Exception):
        pass

    def record(run_config: object, origins: dict, phase1_config: object, ranks: object) -> None:
        seen.append((origins, phase1_config))
        raise Stop

    monkeypatch.setattr("dragkit.trainer.train_run.TrainingRun", record)
    with pytest.raises(Stop):
        dragkit.train_run(config(tmp_path))
    ((origins, phase1),) = seen
    assert set(origins) == {*SETTINGS, "run.checkpoint_dir"} - {"generator.model"}
    assert (phase1.run.phase, phase1.optim.lr, phase1.optim.epochs) == (1, 1e-3, 1)


def test_load_run_evaluates_and_predicts(result: dragkit.TrainResult) -> None:
    run = dragkit.load_run(result.run_dir, device="cpu")
    assert run.checkpoint == result.checkpoint and run.step == 2
    assert run.config.retriever.hidden_dim == 16
    assert isinstance(run.model, torch.nn.Module)
    scored = run.evaluate(FIXTURE, limit=3)
    assert scored.report.counts["asked"] == len(scored.predictions) == 3
    whole = dict(run.evaluate().report.means)
    assert whole == pytest.approx(result.metrics["after phase 2 (joint)"])
    assert dragkit.evaluate_run(result.run_dir, device="cpu") == {str(FIXTURE): whole}
    latest = dragkit.evaluate_run(result.run_dir, [FIXTURE], "latest", "cpu")
    assert latest.keys() == {str(FIXTURE)}


def test_what_is_missing_is_named(result: dragkit.TrainResult, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="nowhere"):
        dragkit.load_run(tmp_path / "nowhere")
    with pytest.raises(MissingInputError, match="none.jsonl: no such file"):
        dragkit.load_run(result.run_dir, device="cpu").evaluate(tmp_path / "none.jsonl")


def test_read_questions_returns_a_list() -> None:
    questions = dragkit.read_questions(FIXTURE)
    assert len(questions) == 8 and isinstance(questions[0], dragkit.Question)
