"""Optimizer and learning-rate schedule, with one parameter group per role."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dragkit.config import OptimConfig


def build_optimizer(groups: Sequence[dict], device: torch.device) -> torch.optim.AdamW:
    """AdamW over the phase's groups, without weight decay for biases, norms and scalars.

    Args:
        groups: dicts with `name`, `params`, `lr`, `weight_decay`.
        device: device of the parameters.
    """
    split = []
    for group in groups:
        matrices = [p for p in group["params"] if p.requires_grad and p.dim() > 1]
        vectors = [p for p in group["params"] if p.requires_grad and p.dim() <= 1]
        if matrices:
            split.append({**group, "params": matrices})
        if vectors:
            split.append({**group, "params": vectors, "weight_decay": 0.0})
    return torch.optim.AdamW(split, fused=True)


def lr_multiplier(step: int, total: int, warmup: int, floor: float) -> float:
    """Fraction of the peak rate at `step`: linear warm-up, then a cosine down to `floor`."""
    # Count from 1, because a rate of zero would waste the first step.
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimConfig, total_steps: int, *, done: int = 0
) -> LambdaLR:
    """The schedule, stepped once per optimizer step. A resumed run has `done` steps already."""
    warmup = max(1, round(config.warmup_ratio * total_steps))
    return LambdaLR(
        optimizer,
        lambda step: lr_multiplier(done + step, total_steps, warmup, config.min_lr_ratio),
    )


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Every parameter that the optimizer updates, in its order."""
    return [p for group in optimizer.param_groups for p in group["params"]]
