"""With the default settings, phase 2 retrieves at least as well as the phase 1 it starts from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dragkit

# Recall alone is bought with precision by a lower threshold.
METRICS = ("retrieval-f1", "retrieval-average-precision")


@pytest.mark.usefixtures("one_thread")
def test_phase_2_does_not_forget_retrieval_on_the_demo(tmp_path: Path) -> None:
    """A few hundred questions are enough for a forgetful phase 2 to lose several points."""
    settings = {"run.device": "cpu", "run.num_threads": 1, "data.train_fraction": 0.2}
    first = {"run.phase": 1, "run.checkpoint_dir": str(tmp_path / "phase1"), "optim.epochs": 10}
    dragkit.train_run(dragkit.load_config("tiny", overrides=settings | first))
    second = {
        "run.checkpoint_dir": str(tmp_path / "phase2"),
        "run.phase1_checkpoint": str(tmp_path / "phase1"),
        "run.val_generation_limit": 8,
        "run.test_before_training": False,
        "generator.max_new_tokens": 1,
        "optim.epochs": 2,
    }
    dragkit.train_run(dragkit.load_config("tiny", overrides=settings | second))
    before, after = (
        json.loads((tmp_path / phase / "results.json").read_text())[stage]["metrics"]
        for phase, stage in (("phase1", "after phase 1"), ("phase2", "after phase 2 (joint)"))
    )
    for metric in METRICS:
        assert after[metric]["mean"] > before[metric]["mean"] - 0.005, metric
