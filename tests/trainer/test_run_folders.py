"""Run folders: what a run finds in one, what it leaves there, and how it goes on with it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import dragkit
from dragkit.checkpoint.checkpoint import RunInUseError, find_checkpoint, load_checkpoint
from dragkit.config import GeneratorConfig, load_config
from dragkit.errors import (
    CheckpointError,
    ConfigError,
    CreateError,
    DataError,
    Interrupted,
    MissingInputError,
)
from dragkit.generator.bundled import tiny_generator_path
from dragkit.generator.load import resolve_generator
from dragkit.retriever.text_encoder import find_encoder
from dragkit.trainer import loop
from dragkit.trainer.loop import Trainer
from dragkit.trainer.phase2 import JointPhase
from dragkit.trainer.resume import resolve_checkpoint
from dragkit.trainer.run_folder import claim_run_dir
from tests.trainer.run_cases import (
    FIXTURE,
    assert_same,
    logged,
    make_run,
    resume_alone,
    shown,
    stop_after,
)

VAL = {"data.val_heuristics_path": str(FIXTURE)}
ONE = {"optim.epochs": 1}


def kill_in(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int = 0) -> None:
    """Sends a SIGTERM in call number `call` of a method, before it does anything."""
    original, calls = getattr(owner, name), iter(range(100))

    def killed(*args: object, **options: object) -> object:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, killed)


# ------------------------------------------------------------------ resume


@pytest.mark.parametrize("phase", [1, 2])
def test_resume_alone_restores_every_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: int
) -> None:
    own = {"run.save_every_steps": 2, "run.keep_checkpoints": 7, "run.val_generation_limit": 2}
    own |= {"run.num_threads": 1, "run.log_every_steps": 1, "optim.grad_clip": 0.5}
    make_run(tmp_path, phase, "whole", **own).execute()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        # In phase 2 the signal comes in the phase 1 that it trains first.
        stop_after(1, patch)
        make_run(tmp_path, phase, "cut", **own).execute()
    resumed = resume_alone(tmp_path / "cut")
    resumed.execute()
    assert_same(tmp_path / "whole", tmp_path / "cut")
    for key, value in own.items():
        section, name = key.split(".")
        assert getattr(getattr(resumed.config, section), name) == value
    steps = [[line["step"] for line in logged(tmp_path / name)] for name in ("whole", "cut")]
    assert steps[0] == steps[1]


def test_a_finished_run_takes_more_epochs_and_another_rate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_run(tmp_path, 1, **ONE, **VAL).execute()
    with caplog.at_level("INFO"):
        resume_alone(tmp_path / "run", **{"optim.epochs": 2, "optim.lr": 2e-3}).execute()
    assert "optim.epochs 1 -> 2, optim.lr 0.001 -> 0.002" in caplog.text
    lines = logged(tmp_path / "run")
    assert [line["step"] for line in lines if "train" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "validation" in line] == [3, 6]
    with pytest.raises(ConfigError, match="1 epochs have 3 steps, but .* has done 6"):
        resume_alone(tmp_path / "run", **ONE).execute()


@pytest.mark.parametrize(
    ("key", "value"),
    [("retriever.hidden_dim", 32), ("run.seed", 5), ("run.phase", 2), ("run.precision", "float32")],
)
def test_what_is_fixed_is_refused_with_the_reason(tmp_path: Path, key: str, value: object) -> None:
    make_run(tmp_path, 1, **ONE).execute()
    with pytest.raises(CheckpointError, match=f"{key}: {value} was given") as caught:
        resume_alone(tmp_path / "run", **{key: value})
    assert "phase 1 again" not in str(caught.value)


def test_a_folder_without_a_run_begins_one_only_where_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no such folder"):
        resume_alone(tmp_path / "rnu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInputError, match="no checkpoint"):
        resume_alone(tmp_path / "empty")
    # The same command for the first start and every restart.
    make_run(tmp_path, 1, "idem", **ONE, **{"run.resume": True}).execute()
    make_run(tmp_path, 1, "idem", **ONE, **{"run.resume": True}).execute()
    assert len(logged(tmp_path / "idem")) == 3


# ------------------------------------------------------------------ signals


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (JointPhase, "predict", 0),  # the untrained evaluation
        (JointPhase, "predict", 2),  # the validation of the first epoch
        (JointPhase, "predict", 4),  # the final evaluation
        (loop.MetricsLog, "drop_after", 0),
        (Trainer, "save", 1),
    ],
)
def test_a_stop_at_any_moment_exits_75_and_resumes_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int
) -> None:
    make_run(tmp_path, 1, "first", **ONE).execute()
    settings = {"run.phase1_checkpoint": str(tmp_path / "first"), "generator.max_new_tokens": 4}
    settings |= VAL | {"data.test_heuristics_path": str(FIXTURE)}
    make_run(tmp_path, 2, "whole", **settings).execute()
    with monkeypatch.context() as patch:
        kill_in(patch, owner, name, call)
        with pytest.raises(Interrupted, match="--resume"):
            make_run(tmp_path, 2, "cut", **settings).execute()
    resume_alone(tmp_path / "cut").execute()
    assert_same(tmp_path / "whole", tmp_path / "cut")
    whole, cut = ([*map(shown, logged(tmp_path / n))] for n in ("whole", "cut"))
    assert whole == cut
    rows = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("whole", "cut")]
    assert list(rows[1].items())[-1] == list(rows[0].items())[-1]
    assert (tmp_path / "whole" / "best").read_text() == (tmp_path / "cut" / "best").read_text()


def test_a_stop_while_packing_leaves_nothing_hidden_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dragkit.data import store

    cache = {"data.cache_dir": str(tmp_path / "cache")}
    with monkeypatch.context() as patch:
        kill_in(patch, store, "pack_file")
        with pytest.raises(Interrupted, match="--resume"):
            make_run(tmp_path, 1, **ONE, **cache).execute()
    assert not list((tmp_path / "cache").rglob(".*"))
    resume_alone(tmp_path / "run").execute()
    assert len(logged(tmp_path / "run")) == 3


# ------------------------------------------------------------------ places


def test_a_second_run_in_a_killed_runs_folder_has_its_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(self: Trainer) -> None:
        raise Killed

    test = {"data.test_heuristics_path": str(FIXTURE)}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "save", kill)
        make_run(tmp_path, 1, **ONE, **test).execute()
    assert len(logged(tmp_path / "run")) == 3
    assert "untrained" in json.loads((tmp_path / "run" / "results.json").read_text())
    few = {"optim.batch_size": 8, "run.test_before_training": False}
    make_run(tmp_path, 1, **ONE, **test, **few).execute()
    assert [line["step"] for line in logged(tmp_path / "run")] == [1]
    assert list(json.loads((tmp_path / "run" / "results.json").read_text())) == ["after phase 1"]


def test_unnamed_runs_never_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda pattern: "20300101-000000")
    config = load_config("tiny", overrides={"run.phase": 1})
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: claim_run_dir(config), range(24)))
    assert len(set(folders)) == 24 and all(folder.is_dir() for folder in folders)
    shutil.rmtree("runs")
    Path("runs").write_text("mine")
    with pytest.raises(CreateError, match="--checkpoint_dir"):
        claim_run_dir(config)


def test_a_folder_is_checked_again_under_its_lock(tmp_path: Path) -> None:
    one, two = (make_run(tmp_path, 1, **ONE) for _ in range(2))
    one.execute()
    with pytest.raises(ConfigError, match="already holds a run"):
        two.execute()
    one, two = (make_run(tmp_path, 1, **{"run.resume": True}) for _ in range(2))
    one.execute()
    with pytest.raises(RunInUseError, match="since this command began"):
        two.execute()


def test_a_run_works_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    make_run(tmp_path, 1, "link", **VAL).execute()
    make_run(tmp_path, 1, "real", **{"run.resume": True, "optim.epochs": 3}).execute()
    assert (tmp_path / "link").is_symlink()
    assert load_checkpoint(find_checkpoint(tmp_path / "link")).state.epoch == 3


def other_tokens(tokenizer: dict) -> dict:
    """A tokenizer whose last two tokens have changed places."""
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    return tokenizer


def test_another_preset_is_refused_when_a_run_goes_on(tmp_path: Path) -> None:
    make_run(tmp_path, 1, **ONE).execute()
    resume_alone(tmp_path / "run", preset="tiny")
    with pytest.raises(CheckpointError, match="preset: webqsp was given, the checkpoint has tiny"):
        resume_alone(tmp_path / "run", preset="webqsp")


def test_a_moved_run_evaluates_and_resumes_with_the_same_inputs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    (project / "models").mkdir(parents=True)
    shutil.copytree(tiny_generator_path(), project / "models" / "mine")
    shutil.copy(FIXTURE, project / "train.jsonl")
    monkeypatch.chdir(project)
    settings = {"generator.model": "models/mine", "data.heuristics_path": "train.jsonl"}
    settings |= {"data.test_heuristics_path": "train.jsonl", "generator.max_new_tokens": 4}
    values = ONE | settings
    make_run(Path(), 2, "run", **values).execute()
    # From another folder, by the run's folder alone.
    monkeypatch.chdir(tmp_path)
    scores = dragkit.evaluate_run(project / "run", device="cpu")
    # Moved with all it reads.
    project.rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    assert [*dragkit.evaluate_run(moved / "run", device="cpu").values()] == [*scores.values()]
    # Moved alone, and told where its inputs are.
    (moved / "run").rename(tmp_path / "alone")
    given = {"generator.model": str(moved / "models" / "mine")}
    given["data.heuristics_path"] = str(moved / "train.jsonl")
    given["data.test_heuristics_path"] = str(moved / "train.jsonl")
    resume_alone(tmp_path / "alone", **given, **{"optim.epochs": 2}).execute()
    # Other content in the place that was given.
    (moved / "other.jsonl").write_text("".join(FIXTURE.read_text().splitlines(True)[:5]))
    with pytest.raises(CheckpointError, match="trained with other test questions"):
        resume_alone(
            tmp_path / "alone",
            **given | {"data.test_heuristics_path": str(moved / "other.jsonl")},
        ).execute()
    tokens = moved / "models" / "mine" / "tokenizer.json"
    kept = tokens.read_text()
    tokens.write_text(json.dumps(other_tokens(json.loads(kept))))
    for again in (
        lambda: resume_alone(tmp_path / "alone", **given).execute(),
        lambda: dragkit.load_run(tmp_path / "alone", device="cpu"),
    ):
        with pytest.raises(CheckpointError, match="other files of the generator's tokenizer"):
            again()
    tokens.write_text(kept)
    weights = moved / "models" / "mine" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2:] = b"\1\1"
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="trained with other generator"):
        resume_alone(tmp_path / "alone", **given).execute()
    with pytest.raises(CheckpointError, match="trained with other generator"):
        dragkit.load_run(tmp_path / "alone", device="cpu")


# ------------------------------------------------------------------ inputs


def test_all_inputs_are_checked_before_phase_1_trains(tmp_path: Path) -> None:
    good = FIXTURE.read_text()
    for name in ("bad_val", "bad_test"):
        (tmp_path / f"{name}.jsonl").write_text(good + "nonsense\n")
    files = {f"data.{x}_heuristics_path": str(tmp_path / f"bad_{x}.jsonl") for x in ("val", "test")}
    with pytest.raises(DataError) as caught:
        make_run(tmp_path, 2, **files).execute()
    assert "bad_val.jsonl:9" in str(caught.value) and "bad_test.jsonl:9" in str(caught.value)
    assert not [*(tmp_path / "run").rglob("step-*"), *(tmp_path / "run").rglob("metrics.jsonl")]


def test_all_missing_files_are_named_together(tmp_path: Path) -> None:
    files = {f"data.{x}_heuristics_path": str(tmp_path / f"no_{x}.jsonl") for x in ("val", "test")}
    with pytest.raises(MissingInputError) as caught:
        make_run(tmp_path, 1, **files)
    assert "no_val.jsonl" in str(caught.value) and "no_test.jsonl" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_name_too_long_for_a_folder_is_no_internal_error(tmp_path: Path) -> None:
    folder = tmp_path / ("n" * 300)
    with pytest.raises(CreateError, match="n" * 300):
        make_run(tmp_path, 1, folder.name, **ONE).execute()
    for asked in (find_checkpoint, resume_alone, lambda run: resolve_checkpoint(run, "best")):
        with pytest.raises(MissingInputError, match="n" * 300):
            asked(folder)
    with pytest.raises(MissingInputError, match="n" * 300):
        find_encoder(str(folder))
    with pytest.raises(MissingInputError, match="n" * 300):
        resolve_generator(GeneratorConfig(), name=str(folder))


@pytest.mark.parametrize("name", ["best", "latest", "metrics.jsonl", "phase1/config.yaml"])
@pytest.mark.parametrize(("make", "kind"), [(os.mkdir, "a folder"), (os.mkfifo, "a pipe")])
def test_what_is_in_the_place_of_a_file_is_refused_before_training(
    make: Callable[[Path], None], kind: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    make(tmp_path / "run" / name)
    with pytest.raises(CreateError, match=f"{name} is {kind}") as caught:
        make_run(tmp_path, 1)
    assert caught.value.exit_code == 73


def test_lines_about_one_file_are_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [json.loads(line) for line in FIXTURE.read_text().splitlines()]
    rows[1]["question"] = "long " * 300
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"data.heuristics_path": str(path), "data.label_noise": 0.5, "optim.epochs": 1}
    settings |= {"generator.max_new_tokens": 2, "generator.max_prompt_tokens": 900}
    with caplog.at_level("INFO"):
        make_run(tmp_path, 2, **settings).execute()
    said = [record.getMessage() for record in caplog.records]
    # Both phases read the file.
    assert any((tmp_path / "run" / "phase1").glob("step-*"))
    assert sum("questions are longer than what the sentence encoder" in x for x in said) == 1
    assert sum("data.label_noise=0.5 moved" in x for x in said) == 1
