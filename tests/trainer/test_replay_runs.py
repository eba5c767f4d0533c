"""Whole runs with replayed steps, and when steps are replayed."""

from __future__ import annotations

import json

import pytest
import torch

from dragkit.errors import Interrupted
from dragkit.trainer import build as build_module
from dragkit.trainer.replay import capture_for
from tests.trainer.replay_cases import Rerun, new_phase, phase1_run
from tests.trainer.run_cases import assert_same, stop_after, tensors

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optim__accumulation_steps": 2, "run__max_cuda_graphs": 1},
        {"retriever__num_stages": 1, "run__precision": "bfloat16"},
    ],
)
def test_a_run_learns_the_same_with_and_without_replay(tmp_path, monkeypatch, settings):
    phase1_run(tmp_path, "plain", **settings).execute()
    capture = Rerun()
    monkeypatch.setattr(build_module, "capture_for", lambda device: capture)
    phase1_run(tmp_path, "replayed", **settings).execute()
    assert capture.recorded and capture.replays > 1
    plain, ours = (tensors(tmp_path / name) for name in ("plain", "replayed"))
    assert plain.keys() == ours.keys()
    limit = 1e-6 if "run__precision" not in settings else 2e-3
    for name in plain:
        # This bias moves all scores of a softmax alike: its gradient is rounding and nothing else.
        if name.startswith("heads/") and not name.endswith("node_score.bias"):
            torch.testing.assert_close(ours[name], plain[name], rtol=0, atol=limit, msg=name)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("plain", "replayed")
    ]
    for line, other in zip(*logs, strict=True):
        assert line["step"] == other["step"] and line["lr"] == other["lr"]


def test_resume_is_bit_exact_with_replay_and_dropout(tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "capture_for", lambda device: Rerun())
    settings = {"retriever__dropout": 0.2, "run__max_cuda_graphs": 1}
    phase1_run(tmp_path, "whole", **settings).execute()
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Interrupted):
            phase1_run(tmp_path, "cut", **settings).execute()
    phase1_run(tmp_path, "cut", run__resume=True, **settings).execute()
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_replay_is_on_where_steps_can_be_recorded_and_wanted(training_run, dataset, monkeypatch):
    assert capture_for(CPU) is None
    phase = new_phase(training_run)
    build_module.maybe_replay(phase, dataset, phase.config, CPU)
    assert phase.replay is None
    monkeypatch.setattr(build_module, "capture_for", lambda device: Rerun())
    monkeypatch.setattr(dataset, "to_device", True)
    off = phase.config.run.model_copy(update={"cuda_graphs": False})
    build_module.maybe_replay(phase, dataset, phase.config.model_copy(update={"run": off}), CPU)
    assert phase.replay is None
    build_module.maybe_replay(phase, dataset, phase.config, CPU)
    assert phase.replay is not None and phase.replay.max_graphs == 16 and not dataset.to_device
