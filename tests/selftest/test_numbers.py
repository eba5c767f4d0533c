"""The self-test's checks of numbers hold, and see a fault in each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from dragkit.selftest.numbers import batches, draws, updates
from dragkit.selftest.numbers.small_joint import SmallJoint, invented_rows
from dragkit.selftest.outcome import Outcome
from dragkit.trainer import anomaly, loop, phase


def run(check: Callable[..., None], *arguments: object, **options: object) -> Outcome:
    outcome = Outcome("x")
    check(outcome, *arguments, **options)
    return outcome


def test_nothing_is_lost_without_a_fault(tmp_path: Path) -> None:
    for check, options, tried in (
        (batches.accumulation, {"root": tmp_path}, 8),
        (batches.batch_invariance, {"root": tmp_path, "batches": 1}, 2),
        (batches.prompt_limits, {"root": tmp_path}, 7),
        (draws.draw_gradients, {"count": 100}, 100),
        (draws.empty_draws, {"root": tmp_path}, 8),
        (updates.anomalies, {"root": tmp_path, "steps": 1}, 10),
        (updates.adapters_learn, {"root": tmp_path}, 40),
        (updates.frozen_weights, {"root": tmp_path, "steps": 3}, 2),
    ):
        outcome = run(check, **options)
        assert outcome.losses == [] and outcome.tried >= tried, check


def test_a_loss_that_is_divided_in_each_micro_batch_is_seen(tmp_path: Path) -> None:
    gradients = SmallJoint.gradients

    def wrong(self: SmallJoint, parts: list) -> tuple:
        found = [gradients(self, [batch]) for batch in parts]
        return sum(loss for loss, _ in found) / len(found), [
            sum(grads) for grads in zip(*(grads for _, grads in found), strict=True)
        ]

    with mock.patch.object(SmallJoint, "gradients", wrong):
        assert len(run(batches.accumulation, tmp_path).losses) == 8


def test_a_draw_whose_gradient_is_scaled_is_seen() -> None:
    op = draws.gumbel_topk

    def scaled(logits: torch.Tensor, *args: object, **options: object) -> object:
        drawn = op(logits, *args, **options)
        gate = drawn.gate.detach() + 1.001 * (drawn.gate - drawn.gate.detach())
        return drawn._replace(gate=gate)

    with mock.patch.object(draws, "gumbel_topk", scaled):
        assert len(run(draws.draw_gradients, count=10).losses) == 10


def test_a_step_that_is_made_all_the_same_is_seen(tmp_path: Path) -> None:
    with mock.patch.object(anomaly.FiniteCheck, "settle", lambda _: None):
        losses = run(updates.anomalies, tmp_path, steps=1).losses
    assert losses


def test_an_answer_loss_of_nothing_is_seen(tmp_path: Path) -> None:
    with mock.patch.object(loop, "with_counted_parts", lambda output, counts: output):
        (loss,) = run(batches.prompt_limits, tmp_path).losses
    assert "an answer loss of 0 is reported" in loss
    assert phase.with_counted_parts is loop.with_counted_parts


def test_frozen_weights_that_change_are_seen(tmp_path: Path) -> None:
    step = loop.Trainer.train_step

    def drifting(self: loop.Trainer, parts: list) -> list:
        frozen = (p for p in self.phase.model.parameters() if not p.requires_grad)
        next(frozen).data.view(-1)[0] += 1e-3
        return step(self, parts)

    with mock.patch.object(loop.Trainer, "train_step", drifting):
        (loss,) = run(updates.frozen_weights, tmp_path, steps=3).losses
    assert "frozen" in loss


# While B is zero, A has no gradient. Each factor is lost in both models.
@pytest.mark.parametrize(("factor", "lost"), [("lora_A", 2), ("lora_B", 4)])
def test_an_adapter_without_a_gradient_is_seen(tmp_path: Path, factor: str, lost: int) -> None:
    step = SmallJoint.__init__

    def deaf(self: SmallJoint, *args: object, **options: object) -> None:
        step(self, *args, **options)
        named = self.phase.model.generator.named_parameters()
        weight = next(p for n, p in named if factor in n)
        weight.register_hook(torch.zeros_like)

    with mock.patch.object(SmallJoint, "__init__", deaf):
        losses = run(updates.adapters_learn, tmp_path).losses
    assert len(losses) == lost and all("no gradient" in loss for loss in losses)


def test_rows_are_the_same_each_time(tmp_path: Path) -> None:
    assert invented_rows(tmp_path, 3) == invented_rows(tmp_path, 3)
