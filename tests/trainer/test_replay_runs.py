"""Whole runs with replayed steps, and when steps are replayed."""

from __future__ import annotations

import json

import pytest
import torch

from dragkit.errors import Interrupted
from dragkit.trainer import build as build_module
from dragkit.trainer.build import build_retriever, build_retriever_phase
from dragkit.trainer.replay import capture_for
from tests.trainer.replay_cases import EagerCapture, phase1_run
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
    phase1_run(tmp_path, "eager", **settings).execute()
    capture = EagerCapture()
    monkeypatch.setattr(build_module, "capture_for", lambda device: capture)
    phase1_run(tmp_path, "replayed", **settings).execute()
    assert capture.captures and capture.replays > 1
    eager, replayed = (tensors(tmp_path / name) for name in ("eager", "replayed"))
    assert eager.keys() == replayed.keys()
    limit = 1e-6 if "run__precision" not in settings else 2e-3
    for name in eager:
        # This bias shifts all scores of a softmax alike, so its gradient is rounding alone.
        if name.startswith("retriever_projector/") and not name.endswith("node_score.bias"):
            torch.testing.assert_close(replayed[name], eager[name], rtol=0, atol=limit, msg=name)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("eager", "replayed")
    ]
    for line, other in zip(*logs, strict=True):
        assert line["step"] == other["step"] and line["lr"] == other["lr"]


def test_resume_is_bit_exact_with_replay_and_dropout(tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "capture_for", lambda device: EagerCapture())
    settings = {"retriever__dropout": 0.2, "run__max_cuda_graphs": 1}
    phase1_run(tmp_path, "whole", **settings).execute()
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Interrupted):
            phase1_run(tmp_path, "cut", **settings).execute()
    phase1_run(tmp_path, "cut", run__resume=True, **settings).execute()
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_steps_are_replayed_where_the_device_and_the_configuration_allow(
    training_run, dataset, monkeypatch
):
    config = training_run.config
    retriever = build_retriever(config, training_run.encoder)
    assert capture_for(CPU) is None
    assert build_retriever_phase(config, retriever, CPU, dataset).replay is None
    monkeypatch.setattr(build_module, "capture_for", lambda device: EagerCapture())
    run = config.run.model_copy(update={"cuda_graphs": False})
    off = config.model_copy(update={"run": run})
    assert build_retriever_phase(off, retriever, CPU, dataset).replay is None
    phase = build_retriever_phase(config, retriever, CPU, dataset)
    assert phase.replay.max_graphs == 16 and phase.takes_host_batches
