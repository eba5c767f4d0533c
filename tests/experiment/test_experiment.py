"""The whole command: document, plot, exit codes, and one experiment with real training."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from dragkit.config.arguments import parse_train_args
from dragkit.errors import ConfigError, DataError
from dragkit.experiment import execute
from dragkit.experiment.__main__ import main, parse_experiment_args
from dragkit.experiment.document import command_line
from dragkit.experiment.plan import read_experiment
from dragkit.experiment.results import gather
from dragkit.experiment.scores import paired_difference
from tests.experiment.cases import FIXTURE, TEXT, program

__all__ = ["program"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: list[str]) -> Path:
    """An experiment's file, with a program in the place of training."""
    monkeypatch.setenv("QUESTIONS", str(FIXTURE))
    monkeypatch.setattr(execute, "Launcher", functools.partial(execute.Launcher, program=program))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(TEXT)
    return path


def rows(document: str, name: str) -> dict[str, list[str]]:
    """The cells of a data set's table by arm."""
    section = document.partition(f"## {name}\n")[2].partition("\n## ")[0]
    found = [re.split(r" *\| *", line.strip("| ")) for line in section.splitlines() if "|" in line]
    return {cells[0]: cells[1:] for cells in found}


def test_the_document_and_the_plot(file: Path, tmp_path: Path) -> None:
    assert main([str(file), "--jobs", "2", "--output", "page/table.md"]) == 0
    text = (tmp_path / "page" / "table.md").read_text()
    table = rows(text, "eight")
    assert list(table) == [
        *("arm", "---", "phase 1", "phase 1 of paths", "none", "both", "paths", "again")
    ]
    # Arm none: 0, 0.25 and 0 of three questions. Arm both: 0.5 more, and 0.25 more with seed 1.
    assert table["none"][:5] == ["2", "8.3 ± 0.0", "", "3.50 ± 0.50", ""]
    difference = paired_difference(np.repeat([[0.5], [0.75]], 3, 1), np.zeros((2, 3)))
    assert difference is not None and (difference.low, difference.high) == (0.5, 0.75)
    assert table["both"][:5] == [
        *("2", "70.8 ± 12.5", "+62.5 [+50.0, +75.0]", "3.50 ± 0.50", "+0.00 [+0.00, +0.00]")
    ]
    assert table["phase 1"][1:5] == ["-", "", "3.50 ± 0.50", "+0.00 [+0.00, +0.00]"]
    assert rows(text, "demo").keys() == table.keys()
    assert "4 test questions. SHA-256 of the question files: train " in text
    assert "Python 3." in text and "torch 2." in text and "cores)" in text
    assert TEXT.strip() in text and str(tmp_path) not in text
    commands = re.findall(r"^python -m dragkit\.train .*$", text, re.MULTILINE)
    # Two phase 1 and four arms of one set and one seed, as one would type them.
    assert len(commands) == 6 and '"data.heuristics_path=${QUESTIONS}"' in commands[0]
    assert "--checkpoint_dir runs/experiments/small/eight/seed-0/phase1 " in commands[0]
    plot = (tmp_path / "page" / "table.svg").read_text()
    assert plot.startswith("<?xml") and "![" in text and "(table.svg)" in text
    for comment in ("strict-f1", "points more than none", "phase 1 of paths", "eight", "demo"):
        assert f"<!-- {comment} -->" in plot
    # The same runs give the same plot, and none is trained again.
    logs = {path: path.read_text() for path in Path("runs").rglob("train.log")}
    assert len(logs) == 24
    assert main([str(file), "--output", "page/again.md"]) == 0
    assert (tmp_path / "page" / "again.svg").read_text() == plot
    assert logs == {path: path.read_text() for path in Path("runs").rglob("train.log")}


def test_one_seed_and_no_baseline(file: Path, tmp_path: Path) -> None:
    file.write_text(TEXT.replace("[0, 1]", "[0]").replace("baseline: none\n", ""))
    assert main([str(file)]) == 0
    results = tmp_path / "runs" / "experiments" / "small" / "results.md"
    table = rows(results.read_text(), "demo")
    assert table["arm"][:3] == ["seeds", "strict-f1", "facts-selected"]
    assert table["both"][:3] == ["1", "58.3 ± -", "3.00 ± -"]
    assert "<!-- percent -->" in results.with_suffix(".svg").read_text()


def test_a_failed_run_is_reported_and_the_rest_is_shown(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAIL", "arm-none phase1-paths")
    text = TEXT.replace("  demo:\n", "")
    file.write_text(text)
    assert main([str(file), "--runs", "r"]) == 66
    table = rows(Path("r/results.md").read_text(), "eight")
    assert table["none"][:3] == ["0", "-", ""] and table["paths"][:2] == ["0", "-"]
    assert table["both"][:3] == ["2", "70.8 ± 12.5", ""]
    errors = capsys.readouterr().err
    assert "eight seed 1 arm-none failed with exit code 66. Its log is r/eight/seed-1" in errors
    assert errors.count("failed with exit code") == 4
    # Afterwards only what is missing is trained.
    monkeypatch.delenv("FAIL")
    assert main([str(file), "--runs", "r"]) == 0
    table = rows(Path("r/results.md").read_text(), "eight")
    assert table["both"][2] == "+62.5 [+50.0, +75.0]" and table["again"][0] == "2"
    assert Path("r/eight/seed-0/arm-both/train.log").read_text() == "log of arm-both\n"
    assert Path("r/eight/seed-0/arm-none/train.log").read_text() == "log of arm-none\n" * 2


def test_nothing_is_written_where_every_run_fails(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "phase1 phase1-paths")
    assert main([str(file), "--output", "table.md"]) == 66
    assert not Path("table.md").exists()


def test_outputs_are_opened_before_the_work(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("table.svg").mkdir()
    Path("file").write_text("")
    for output, named in (("table.md", "table.svg"), ("file/table.md", "file/table.md")):
        assert main([str(file), "--output", output]) == 73
        assert f"{named}: cannot be created" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_arms_with_different_seeds_are_compared_on_those_they_share(file: Path) -> None:
    assert main([str(file), "--runs", "r"]) == 0
    (Path("r/eight/seed-0/arm-none/experiment.json")).unlink()
    (result, _) = gather(read_experiment(file), Path("r"))
    none, both = result.rows["arm-none"], result.rows["arm-both"]
    assert (list(none.runs), list(both.runs)) == ([1], [0, 1])
    # Seed 1 alone: 0.75 more.
    assert both.differences["strict-f1"].mean == pytest.approx(0.75)
    assert both.means["strict-f1"].mean == pytest.approx(0.25 / 3 + 0.625)


def test_runs_that_cannot_be_compared_are_refused(file: Path) -> None:
    assert main([str(file), "--runs", "r"]) == 0
    experiment = read_experiment(file)
    path = Path("r/eight/seed-1/arm-both/test_predictions.jsonl")
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    with pytest.raises(DataError, match="arm-both: its test questions are not those"):
        gather(experiment, Path("r"))
    file.write_text(TEXT.replace("facts-selected]", "strict-f2]"))
    with pytest.raises(ConfigError, match="no run has strict-f2. There are facts-selected, str"):
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
        gather(read_experiment(file), Path("r"))


def test_a_dry_run_prints_the_commands_of_what_is_left(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(file), "--runs", "r", "--dry-run", "--gpus", "0,1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 24 and not Path("r").exists()
    assert all("--device" not in line for line in lines)
    assert main([str(file), "--runs", "r"]) == 0
    (Path("r/demo/seed-1/arm-both/experiment.json")).unlink()
    capsys.readouterr()
    assert main([str(file), "--runs", "r", "--dry_run", "--jobs", "1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "--checkpoint_dir r/demo/seed-1/arm-both" in line and "--device cpu" in line


def test_a_command_line_is_quoted_for_a_shell() -> None:
    words = ["--set", "data.heuristics_path=${A}/a b.jsonl", "--set", "x=$(rm)", "${A}`rm`"]
    assert command_line(words) == (
        'python -m dragkit.train --set "data.heuristics_path=${A}/a b.jsonl" '
        "--set 'x=$(rm)' '${A}`rm`'"
    )


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("", "required: FILE"),
        ("x --jobs 0", "--jobs must be a whole number of at least 1, got '0'"),
        ("x --gpus 0,a", "--gpus must be different numbers such as 0,1, got '0,a'"),
        ("x --gpus 0,0", "--gpus must be"),
        ("x --gpus 0 --jobs 2", "--jobs: every GPU has one run at a time"),
        ("x --output table.txt", "--output must end in .md"),
        ("x --frobnicate", "unrecognized arguments: --frobnicate"),
    ],
)
def test_mistakes_in_the_command(line: str, part: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(part)):
        parse_experiment_args(line.split())


@pytest.mark.slow
def test_a_real_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUESTIONS", str(FIXTURE))
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", ".:kernels")
    file, root = tmp_path / "real.yaml", tmp_path / "runs"
    file.write_text(
        "name: real\nseeds: [3]\n"
        "data: {eight: {heuristics_path: '${QUESTIONS}', test_heuristics_path: '${QUESTIONS}'}}\n"
        "settings: {preset: tiny, retriever.hidden_dim: 16, optim: {epochs: 1, batch_size: 4},\n"
        "  generator: {model: tiny, max_new_tokens: 4}}\n"
        "arms: {text: {generator.structural_vectors: false}, both: }\n"
        "baseline: text\nmetrics: [strict-f1, retrieval-recall, facts-selected]\n"
    )
    assert main([str(file), "--runs", str(root), "--jobs", "2"]) == 0
    folder = root / "eight" / "seed-3" / "arm-both"
    first = (root / "results.md").read_text()
    table = rows(first, "eight")
    # The means of the table are those that training itself printed.
    stages = json.loads((folder / "results.json").read_text())
    assert list(stages) == ["after phase 2 (joint)"]
    metrics = stages["after phase 2 (joint)"]["metrics"]
    assert table["both"][1] == f"{100 * metrics['strict-f1']['mean']:.1f} ± -"
    assert table["both"][3] == f"{100 * metrics['retrieval-recall']['mean']:.1f} ± -"
    assert table["both"][5] == f"{metrics['facts-selected']['mean']:.2f} ± -"
    assert table["phase 1"][1] == "-" and table["phase 1"][3] != "-"
    # A run that was interrupted after its last step is resumed, evaluates, and is as before.
    record = json.loads((folder / "experiment.json").read_text())
    (folder / "experiment.json").write_text(json.dumps(record | {"finished": False}))
    predictions = (folder / "test_predictions.jsonl").read_text()
    (folder / "test_predictions.jsonl").unlink()
    assert main([str(file), "--runs", str(root), "--jobs", "2"]) == 0
    assert (folder / "test_predictions.jsonl").read_text() == predictions
    again = json.loads((folder / "experiment.json").read_text())
    assert again["finished"] and again["seconds"] > record["seconds"]


def test_the_committed_experiments_are_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted((Path(__file__).parents[2] / "experiments").glob("*.yaml"))
    assert files
    monkeypatch.setenv("DRAGKIT_DATA", str(tmp_path))
    for file in files:
        for name in re.findall(r"\$\{DRAGKIT_DATA\}/([\w.-]+)", file.read_text()):
            (tmp_path / name).touch()
        experiment = read_experiment(file)
        assert experiment.file.name == file.stem
        for run in experiment.runs:
            parse_train_args(run.arguments)
