"""Schedule values computed by hand, parameter groups by their effect, rates after a resume."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dragkit.config import OptimConfig
from dragkit.trainer.optim import (
    build_optimizer,
    build_scheduler,
    lr_multiplier,
    trained_parameters,
)

CPU = torch.device("cpu")


def groups_of(*modules: nn.Module, lr: float = 0.1, decay: float = 0.5) -> list[dict]:
    """One group per module, with distinct rates lr, 2 lr, ..."""
    return [
        {
            "name": f"part{i}",
            "params": list(module.parameters()),
            "lr": lr * (i + 1),
            "weight_decay": decay,
        }
        for i, module in enumerate(modules)
    ]


def run_rates(optimizer: torch.optim.Optimizer, scheduler: object, steps: int) -> list[list[float]]:
    """The rates of all groups at each optimizer step."""
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("step", "multiplier"),
    [
        # Ten steps, two of them warm-up, floor 0.1, then a cosine over eight steps.
        (0, 0.5),
        (1, 1.0),
        (2, 1.0),
        (4, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2),
        (6, 0.55),
        (8, 0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2),
        (10, 0.1),
        (25, 0.1),
    ],
)
def test_schedule_values_by_hand(step: int, multiplier: float) -> None:
    assert lr_multiplier(step, total=10, warmup=2, floor=0.1) == pytest.approx(multiplier)


@pytest.mark.parametrize("total", [0, 1, 2])
def test_a_run_too_short_for_a_schedule_has_finite_rates(total: int) -> None:
    optimizer = build_optimizer(groups_of(nn.Linear(2, 2)), CPU)
    scheduler = build_scheduler(optimizer, OptimConfig(), total)
    assert all(0 <= rate <= 0.1 for rates in run_rates(optimizer, scheduler, 3) for rate in rates)


@pytest.mark.parametrize("done", [0, 1, 3, 19])
@pytest.mark.parametrize("used_before", [False, True])
def test_rates_are_those_of_the_schedule_also_after_a_resume(done: int, used_before: bool) -> None:
    config = OptimConfig(warmup_ratio=0.15, min_lr_ratio=0.05)
    modules = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    whole = build_optimizer(groups_of(*modules), CPU)
    expected = run_rates(whole, build_scheduler(whole, config, 20), 20)
    for step, rates in enumerate(expected):
        multiplier = lr_multiplier(step, 20, 3, 0.05)
        assert rates == pytest.approx([0.1 * multiplier, 0.2 * multiplier])

    resumed = build_optimizer(groups_of(*modules), CPU)
    if used_before:  # the trainer builds a schedule from step 0 before it resumes
        build_scheduler(resumed, config, 20)
    scheduler = build_scheduler(resumed, config, 20, done=done)
    # Bit for bit, because a resumed run must equal an uninterrupted one.
    assert run_rates(resumed, scheduler, 20 - done) == expected[done:]


def test_weights_decay_and_biases_norms_and_scalars_do_not() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    module.register_parameter("scale", nn.Parameter(torch.tensor(2.0)))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = build_optimizer(groups_of(module, lr=0.1, decay=0.5), CPU)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in module.named_parameters():
        # With a zero gradient AdamW only multiplies by 1 - lr * weight_decay.
        factor = 1 - 0.1 * 0.5 if name == "0.weight" else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
    assert bool((before["1.weight"] != 0).all()), "a zero would not show decay"


def test_groups_keep_roles_rates_and_the_order_of_saved_optimizer_states() -> None:
    first, second, third = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)
    second.weight.requires_grad_(False)
    optimizer = build_optimizer(groups_of(nn.Sequential(first, third), second), CPU)
    expected = [
        (first.weight, ("part0", 0.1, 0.5)),
        (third.weight, ("part0", 0.1, 0.5)),
        (first.bias, ("part0", 0.1, 0.0)),
        (third.bias, ("part0", 0.1, 0.0)),
        (second.bias, ("part1", 0.2, 0.0)),
    ]
    actual = [
        (id(p), (group["name"], group["lr"], group["weight_decay"]))
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert actual == [(id(p), settings) for p, settings in expected]
    assert [id(p) for p in trained_parameters(optimizer)] == [key for key, _ in actual]
