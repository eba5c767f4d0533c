"""Runs on eight invented questions, for the trainer's tests."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dragkit.checkpoint.checkpoint import find_checkpoint, load_checkpoint
from dragkit.config import resolve_config
from dragkit.trainer.loop import Trainer
from dragkit.trainer.run import TrainingRun

FIXTURE = Path(__file__).parents[1] / "fixtures" / "heuristics_tiny.jsonl"


def make_run(tmp_path: Path, phase: int, name: str = "run", **overrides: object) -> TrainingRun:
    """A run in `tmp_path / name`. `overrides` are dotted settings."""
    values = {
        "run.phase": phase,
        "run.device": "cpu",
        "run.num_threads": 1,
        "run.checkpoint_dir": str(tmp_path / name),
        "run.log_every_steps": 1,
        "data.heuristics_path": str(FIXTURE),
        "generator.model": "tiny",
        "retriever.hidden_dim": 16,
        "optim.batch_size": 3,
        "optim.epochs": 2,
        "optim.lr": 1e-3,
    } | overrides
    config, origins = resolve_config("tiny", None, values)
    phase1, _ = resolve_config("tiny", None, values | {"run.phase": 1})
    return TrainingRun(config, origins, phase1)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint."""
    loaded = load_checkpoint(find_checkpoint(folder))
    flat = {f"{part}/{k}": v for part, group in loaded.tensors.items() for k, v in group.items()}
    adapter = loaded.folder / "adapter" / "adapter_model.safetensors"
    if adapter.is_file():
        flat |= {f"adapter/{k}": v for k, v in load_file(adapter).items()}
    return flat


def assert_same(a: Path, b: Path) -> None:
    """The newest checkpoints of two runs are equal bit for bit."""
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends this process a SIGTERM after `steps` optimizer steps."""
    original, remaining = Trainer.train_step, iter(range(steps - 1, -1, -1))

    def counted(self: Trainer, batches: list) -> list:
        out = original(self, batches)
        if next(remaining, None) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return out

    monkeypatch.setattr(Trainer, "train_step", counted)


def logged(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def resume_alone(folder: Path, **settings: object) -> TrainingRun:
    """`--resume FOLDER` with these settings and nothing else."""
    config, origins = resolve_config(None, None, {"run.resume": str(folder)} | settings)
    first, _ = resolve_config(None, None, {"run.phase": 1} | settings)
    return TrainingRun(config, origins, first)


def shown(line: dict) -> tuple:
    """What a line says, without times."""
    return line["step"], line.get("train"), line.get("validation")
