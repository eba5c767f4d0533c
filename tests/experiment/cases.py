"""An experiment's file, and a program that stands in for training."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dragkit.experiment.plan import Experiment, read_experiment

FIXTURE = Path(__file__).parents[1] / "fixtures" / "heuristics_tiny.jsonl"
TEXT = """\
name: small
seeds: [0, 1]
data:
  eight:
    heuristics_path: ${QUESTIONS}
    test_heuristics_path: ${QUESTIONS}
    phase1: {optim.epochs: 4}
  demo:
settings:
  preset: tiny
  generator.model: tiny
  optim: {lr: 1e-3, batch_size: 4}
  phase1: {optim.batch_size: 8}
arms:
  none: {generator.structural_vectors: false}
  both:
  paths: {data.label_rule: paths, phase1: {data.label_rule: paths}}
  again: {phase1: {data.label_rule: paths}}
baseline: none
metrics: [strict-f1, facts-selected]
"""
# Scores depend on the arm and on the seed. Questions have ids, and one lacks a metric.
PROGRAM = """\
import json, os, sys
from pathlib import Path
words = sys.argv[1:]
value = lambda flag: words[words.index(flag) + 1]
folder, seed = Path(value("--checkpoint_dir")), int(value("--seed"))
(folder / "words.json").write_text(json.dumps([words, dict(os.environ)]))
print("log of", folder.name)
if folder.name in os.environ.get("FAIL", "").split():
    sys.exit(66)
up = {"arm-both": 0.5}.get(folder.name, 0.0) + 0.25 * seed * (folder.name == "arm-both")
with (folder / "test_predictions.jsonl").open("w") as file:
    for number in range(4):
        scores = {"facts-selected": 3.0 + seed}
        if value("--phase") == "2" and number < 3:
            scores["strict-f1"] = 0.25 * (number % 2) + up
        file.write(json.dumps({"id": f"q{number}", "scores": scores}) + "\\n")
"""


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    """The command of the program that stands in for training."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return [sys.executable, str(path)]


def read_text(text: str, folder: Path) -> Experiment:
    """Reads an experiment from its text."""
    path = folder / "small.yaml"
    path.write_text(text)
    return read_experiment(path)
