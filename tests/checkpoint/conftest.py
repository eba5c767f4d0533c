"""Checkpoints whose every value follows from their step."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dragkit.checkpoint.checkpoint import Snapshot, TrainState, save_checkpoint


def _state_at(step: int, **changes: object) -> TrainState:
    state = TrainState("joint", 1, step, 7, 8 * step, 0.1 + step, {"lr": 1e-4, "hash": "ab"})
    return dataclasses.replace(state, **changes)


def _snapshot_at(step: int) -> Snapshot:
    def adapter(folder: Path) -> None:
        (folder / "adapter_config.json").write_text(f'{{"r": {step}}}')
        save_file({"lora_A": torch.full((2, 3), float(step))}, folder / "adapter_model.safetensors")

    return Snapshot(
        tensors={
            "heads": {"w": torch.full((3, 4), float(step)), "b": torch.tensor(step)},
            "optim": {"w/exp_avg": torch.full((3, 4), -float(step))},
        },
        folders={"adapter": adapter},
        json={"config": {"seed": step}},
    )


def _save_steps(root: Path, *steps: int, **options: object) -> None:
    for step in steps:
        save_checkpoint(root, step, _snapshot_at(step), _state_at(step), **options)


@pytest.fixture
def state_at() -> Callable[..., TrainState]:
    """Call with a step, and fields to change."""
    return _state_at


@pytest.fixture
def snapshot_at() -> Callable[[int], Snapshot]:
    """Call with a step; every value in the snapshot follows from it."""
    return _snapshot_at


@pytest.fixture
def save_steps() -> Callable[..., None]:
    """Call with a root, steps, and options of `save_checkpoint`."""
    return _save_steps


@pytest.fixture(scope="session")
def _two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two") / "run"
    _save_steps(root, 10, 20)
    return root


@pytest.fixture
def run(_two_saved: Path, tmp_path: Path) -> Path:
    """A copy of a run with checkpoints at steps 10 and 20."""
    shutil.copytree(_two_saved, tmp_path / "run")
    return tmp_path / "run"
