"""What a saved step of the trainer's tests consists of."""

from __future__ import annotations

from collections.abc import Callable

from dragkit.checkpoint.checkpoint import Snapshot, TrainState

FILES = (
    "heads.safetensors",
    "optim.safetensors",
    "state.json",
    "config.json",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
)
# Types of the fixtures `state_at`, `snapshot_at` and `save_steps`.
StateAt = Callable[..., TrainState]
SnapshotAt = Callable[[int], Snapshot]
SaveSteps = Callable[..., None]
