"""Checkpoints whose every value follows from their step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dragkit.checkpoint.checkpoint import Snapshot, TrainState, mark_best, save_checkpoint

FILES = (
    "heads.safetensors",
    "optim.safetensors",
    "state.json",
    "config.json",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
)


def state_at(step: int, **changes: object) -> TrainState:
    state = TrainState("joint", 1, step, 7, 8 * step, 0.1 + step, {"lr": 1e-4, "hash": "ab"})
    return dataclasses.replace(state, **changes)


def snapshot_at(step: int) -> Snapshot:
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


def save_steps(root: Path, *steps: int, is_best: bool = False, **options: object) -> None:
    for step in steps:
        save_checkpoint(root, step, snapshot_at(step), state_at(step), **options)
        if is_best:
            mark_best(root, step)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
