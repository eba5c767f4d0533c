"""Starting, resuming and stopping of runs, with programs that stand in for training."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from dragkit.errors import ConfigError
from dragkit.experiment import execute
from dragkit.experiment.execute import Launcher, read_record, state, states, train_all
from dragkit.experiment.plan import Experiment, Run
from tests.experiment.cases import FIXTURE, TEXT, program, read_text

__all__ = ["program"]


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.setenv("QUESTIONS", str(tmp_path / "questions.jsonl"))
    (tmp_path / "questions.jsonl").write_bytes(FIXTURE.read_bytes())
    execute._sha256.cache_clear()
    return read_text(TEXT, tmp_path)


def new(experiment: Experiment) -> dict[Run, str]:
    return dict.fromkeys(experiment.runs, "new")


def given(root: Path, run: Run) -> tuple[list[str], dict[str, str]]:
    """The arguments and the environment that the program got."""
    words, environment = json.loads((root / run.folder / "words.json").read_text())
    return words, environment


def test_what_a_run_is_given(experiment: Experiment, tmp_path: Path, program: list[str]) -> None:
    launcher = Launcher(tmp_path / "runs", 3, commit="c0ffee", program=program)
    arm = next(run for run in experiment.runs if run.arm == "both")
    assert launcher.train(arm, resume=False) == 0
    words, environment = given(launcher.root, arm)
    assert environment["OMP_NUM_THREADS"] == "3"
    for flag, value in (
        ("--checkpoint_dir", launcher.root / arm.folder),
        ("--phase1_checkpoint", launcher.root / arm.first.folder),
        ("--device", "cpu"),
        ("--phase", 2),
    ):
        assert words[words.index(flag) + 1] == str(value)
    assert "run.num_threads=3" in words and "--resume" not in words
    assert f"data.heuristics_path={tmp_path / 'questions.jsonl'}" in words
    assert (launcher.root / arm.folder / "train.log").read_text() == "log of arm-both\n"
    record = read_record(arm, launcher.root)
    assert record["finished"] and record["commit"] == "c0ffee" and 0 < record["seconds"] < 60
    assert launcher.train(arm, resume=True) == 0
    assert given(launcher.root, arm)[0][-1] == "--resume"
    # The time of a resumed run is that of all its parts.
    assert read_record(arm, launcher.root)["seconds"] > record["seconds"]


def test_every_gpu_has_one_run_at_a_time(experiment: Experiment, tmp_path: Path) -> None:
    path = tmp_path / "busy.py"
    path.write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "folder = Path(sys.argv[sys.argv.index('--checkpoint_dir') + 1])\n"
        f"lock = Path({str(tmp_path)!r}, 'gpu' + os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "lock.touch(exist_ok=False)\n"
        "time.sleep(0.05)\n"
        "(folder / 'test_predictions.jsonl').write_text(lock.name)\n"
        "lock.unlink()\n"
    )
    launcher = Launcher(tmp_path / "runs", 1, ("3", "5"), program=[sys.executable, str(path)])
    # More jobs than GPUs: a run without a GPU waits.
    assert train_all(new(experiment), 4, launcher.train, launcher.stop) == {}
    used = {(launcher.root / run.folder / execute.SCORES).read_text() for run in experiment.runs}
    assert used == {"gpu3", "gpu5"}


def test_phase_1_comes_first_and_no_more_than_the_jobs_run(experiment: Experiment) -> None:
    lock, running, most, order = threading.Lock(), set(), [], []

    def train(run: Run, resume: bool) -> int:
        with lock:
            running.add(run)
            most.append(len(running))
            order.append(run)
            assert run.first is None or (run.first in order and run.first not in running)
        time.sleep(0.002)
        with lock:
            running.remove(run)
        return 0

    assert train_all(new(experiment), 3, train, lambda: None) == {}
    assert sorted(map(str, order)) == sorted(map(str, experiment.runs)) and max(most) == 3


def test_a_failed_run_takes_no_others_but_those_that_start_from_it(experiment: Experiment) -> None:
    ran: list[str] = []

    def train(run: Run, resume: bool) -> int:
        ran.append(str(run))
        return {"eight seed 0 phase1": 70, "demo seed 1 arm-both": -9}.get(str(run), 0)

    runs = new(experiment)
    finished = next(run for run in runs if str(run) == "demo seed 0 phase1")
    runs[finished] = "finished"
    failed = train_all(runs, 2, train, lambda: None)
    assert {str(run): code for run, code in failed.items()} == {
        "eight seed 0 phase1": 70,
        "demo seed 1 arm-both": -9,
    }
    left_out = {"eight seed 0 arm-none", "eight seed 0 arm-both", "demo seed 0 phase1"}
    assert set(ran) == set(map(str, runs)) - left_out and len(ran) == len(set(ran))


def test_a_run_without_scores_has_failed(experiment: Experiment, tmp_path: Path) -> None:
    launcher = Launcher(tmp_path / "runs", 1, program=[sys.executable, "-c", ""])
    run = experiment.runs[0]
    assert launcher.train(run, resume=False) == 70
    assert not read_record(run, launcher.root)["finished"]


def test_an_interruption_lets_the_runs_save_and_starts_no_others(
    experiment: Experiment, tmp_path: Path
) -> None:
    path = tmp_path / "slow.py"
    path.write_text(
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "folder = Path(sys.argv[sys.argv.index('--checkpoint_dir') + 1])\n"
        "def stop(number, frame):\n"
        "    (folder / 'saved').write_text(signal.Signals(number).name)\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "(folder / 'ready').write_text(str(os.getsid(0)))\n"
        "time.sleep(60)\n"
    )
    root = tmp_path / "runs"
    launcher = Launcher(root, 1, program=[sys.executable, str(path)])

    def interrupt() -> None:
        while len(list(root.rglob("ready"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    # A process in the background of a shell ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_all(new(experiment), 2, launcher.train, launcher.stop)
    finally:
        signal.signal(signal.SIGINT, before)
    saved = list(root.rglob("saved"))
    assert [file.read_text() for file in saved] == ["SIGTERM"] * 2
    # Two are stopped. A third may have taken a free place, but starts no process.
    sessions = [int(file.read_text()) for file in root.rglob("ready")]
    # In sessions of their own, Ctrl-C of a terminal reaches them once, by way of this process.
    assert len(set(sessions)) == 2 and os.getsid(0) not in sessions
    assert not any(json.loads(f.read_text())["finished"] for f in root.rglob("experiment.json"))


def test_the_state_of_a_run(
    experiment: Experiment, tmp_path: Path, program: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "runs"
    launcher = Launcher(root, 1, program=program)
    run = next(run for run in experiment.runs if run.arm == "both")
    assert state(run, root) == "new"
    monkeypatch.setenv("FAIL", "arm-both")
    assert launcher.train(run, resume=False) == 66
    assert state(run, root) == "new"
    monkeypatch.setattr(execute, "last_intact", lambda folder: folder)
    assert state(run, root) == "resume"
    (root / run.folder / "experiment.json").unlink()
    with pytest.raises(ConfigError, match="arm-both: holds a run that is not of an experiment"):
        state(run, root)
    monkeypatch.undo()
    monkeypatch.setenv("QUESTIONS", str(tmp_path / "questions.jsonl"))
    assert launcher.train(run, resume=False) == 0
    assert state(run, root) == "finished"


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("  both:", "  both: {loss.rho: 0.5}", "other settings in phase2: loss.rho=0.7"),
        # Phase 1 is part of what a run of phase 2 is.
        ("optim.batch_size: 8", "optim.batch_size: 2", "in phase1: optim.batch_size=8"),
        ("lr: 1e-3", "lr: 2e-3", "in phase2: optim.lr=0.001"),
    ],
)
def test_a_finished_run_with_other_settings_is_refused(
    old: str, new: str, part: str, experiment: Experiment, tmp_path: Path, program: list[str]
) -> None:
    launcher = Launcher(tmp_path / "runs", 1, program=program)
    for run in experiment.runs:
        if run.arm == "both":
            launcher.train(run, resume=False)
    found = states(experiment.runs, launcher.root)
    assert {run.arm for run, kind in found.items() if kind == "finished"} == {"both"}
    assert old in TEXT
    changed = read_text(TEXT.replace(old, new), tmp_path)
    with pytest.raises(ConfigError) as caught:
        states(changed.runs, launcher.root)
    # All folders are listed, and the remedy.
    lines = str(caught.value).splitlines()
    assert len(lines) == 4 and all(part in line and "--runs" in line for line in lines)


def test_a_record_without_a_newer_setting_has_its_default(
    experiment: Experiment, tmp_path: Path, program: list[str]
) -> None:
    launcher = Launcher(tmp_path / "runs", 1, program=program)
    run = experiment.runs[-1]
    launcher.train(run, resume=False)
    path = launcher.root / run.folder / "experiment.json"
    record = json.loads(path.read_text())
    del record["settings"]["phase2"]["loss"]["margin"]
    path.write_text(json.dumps(record))
    assert state(run, launcher.root) == "finished"


def test_changed_questions_are_noticed(
    experiment: Experiment, tmp_path: Path, program: list[str]
) -> None:
    launcher = Launcher(tmp_path / "runs", 1, program=program)
    run = next(run for run in experiment.runs if run.data == "eight")
    launcher.train(run, resume=False)
    with (tmp_path / "questions.jsonl").open("a") as file:
        file.write(" ")
    execute._sha256.cache_clear()
    with pytest.raises(ConfigError, match="question files have changed"):
        state(run, launcher.root)
