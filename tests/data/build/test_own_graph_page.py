"""The commands of docs/own-graph.md, from a graph and questions to answers."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.documents import ROOT, dragkit_commands, read

# Of each split. The example takes all of them, and trains for minutes.
_QUESTIONS = {"train": 64, "dev": 8, "test": 8}


def _shorten(questions: Path) -> None:
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    assert len(rows) == 3240
    kept = [
        row
        for split, count in _QUESTIONS.items()
        for row in [row for row in rows if row["split"] == split][:count]
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in kept))


def test_the_example_goes_from_a_graph_to_answers(tmp_path: Path) -> None:
    page = read(ROOT / "docs" / "own-graph.md").split("\n## ")[1]
    commands = dragkit_commands(page)
    names = [module.removeprefix("dragkit.") for module, _ in commands]
    assert names == ["demo.build", "data", "data", "data", "train", "evaluate"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    for module, arguments in commands:
        if module == "dragkit.train":
            arguments = [*arguments, "--epochs", "1"]
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stderr)
        if module == "dragkit.demo.build":
            _shorten(tmp_path / "source" / "qa.jsonl")
    for split, count in _QUESTIONS.items():
        with gzip.open(tmp_path / "own" / f"{split}.jsonl.gz") as lines:
            rows = [json.loads(line) for line in lines]
        assert len(rows) == count
        assert all(0 < len(row["triples"]) <= 50 for row in rows if row["topic_entities"])
        assert sum(row["answer_in_subgraph"] for row in rows) >= 0.75 * count
    assert "<svg" in (tmp_path / "question.html").read_text()
    (answers,) = json.loads((tmp_path / "answers.json").read_text())["files"].values()
    assert len(answers["predictions"]) == _QUESTIONS["test"]
    assert all(p["text"] is not None and p["facts"] for p in answers["predictions"])
