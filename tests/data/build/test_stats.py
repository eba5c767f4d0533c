"""`data stats`: a Markdown table and histograms, and what happens without them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dragkit.data.__main__ import main
from dragkit.data.build.stats import bin_edges

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def files(random_rows: Callable[..., list[dict]], tmp_path: Path) -> list[str]:
    paths = [tmp_path / name for name in ("a|$x$.train.jsonl", "b.dev.jsonl")]
    for seed, path in enumerate(paths):
        rows = random_rows(20, seed=seed, max_facts=70)
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return [str(path) for path in paths]


def test_the_table_is_markdown(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == r"|  | a\|$x$.train.jsonl | b.dev.jsonl |"
    assert {line.replace(r"\|", "").count("|") for line in lines} == {4}
    assert "| questions | 20 | 20 |" in lines
    heads = [line.split("|")[1].strip() for line in lines]
    assert heads.index("topics") < heads.index("answers") < heads.index("relations")


def test_outputs_are_files_of_the_same_bytes_each_time(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["stats", *files])
    table = capsys.readouterr().out
    seen = set()
    for name in ("one", "two"):
        page, plot = tmp_path / f"{name}.md", tmp_path / "new" / f"{name}.png"
        assert main(["stats", *files, "--output", str(page), "--plot", str(plot)]) == 0
        assert page.read_text() == table
        seen.add(plot.read_bytes())
    assert len(seen) == 1 and seen.pop().startswith(PNG)
    assert capsys.readouterr().out == ""


def test_questions_without_hops_or_facts_are_drawn(tmp_path: Path) -> None:
    path, plot = tmp_path / "a.jsonl", tmp_path / "a.png"
    path.write_text('{"question": "q", "triples": []}\n')
    assert main(["stats", str(path), "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(PNG)


def test_bad_rows_leave_no_output(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "a.png"
    for path in files:
        with open(path, "a") as file:
            file.write("{\n")
    assert main(["stats", *files, "--plot", str(plot)]) == 65
    out, err = capsys.readouterr()
    assert out == "" and all(f"{path}:21: $: " in err for path in files)
    assert not plot.exists() and sorted(tmp_path.iterdir()) == sorted(map(Path, files))


def test_without_matplotlib_the_error_names_the_extra(
    files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["stats", *files, "--plot", "a.png"]) == 66
    assert "pip install 'dragkit[experiment]'" in capsys.readouterr().err


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=50))
def test_bins_hold_every_number_once(values: list[int]) -> None:
    edges = bin_edges(max(values))
    assert (np.diff(edges) >= 1).all() and (edges % 1 == 0.5).all()
    inside = [(edges[:-1] < value) & (value < edges[1:]) for value in values]
    assert np.array_equal(np.sum(inside, 1), np.ones(len(values)))
    assert edges[0] == -0.5 and edges[-1] == max(values) + 0.5 and len(edges) <= 62
