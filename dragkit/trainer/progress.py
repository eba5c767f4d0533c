"""What a run shows while it goes: a bar on a terminal, a line every N steps elsewhere."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from dragkit.trainer.phase import StepOutput

if TYPE_CHECKING:
    from dragkit.trainer.loop import Trainer

logger = logging.getLogger(__name__)

# Parts that add up over the micro-batches of a step; the others are averaged.
_SHARES = ("retrieval", "generator", "token_accuracy")


class Progress:
    """Reads the step's tensors only every `log_every_steps` steps, since reading waits for them."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.every = trainer.config.run.log_every_steps
        self._parts: list[dict[str, torch.Tensor]] = []

    def __enter__(self) -> Progress:
        self.bar = tqdm(
            total=self.trainer.total_steps,
            initial=self.trainer.state.step,
            desc=self.trainer.phase.name,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def step(self, outputs: list[StepOutput]) -> None:
        """To be called after every optimizer step."""
        trainer = self.trainer
        total = {"loss": sum(out.loss for out in outputs)}
        for name in outputs[0].parts:
            total[name] = sum(out.parts[name] for out in outputs)
            if name not in _SHARES:
                total[name] = total[name] / len(outputs)
        self._parts.append(total)
        self.bar.update(1)
        if trainer.state.step % self.every and trainer.state.step != trainer.total_steps:
            return
        names = dict.fromkeys(name for part in self._parts for name in part)
        means = {
            name: float(torch.stack([p[name].float() for p in self._parts if name in p]).mean())
            for name in names
        }
        self._parts.clear()
        rate = trainer.meter.read()
        left = (trainer.total_steps - trainer.state.step) * rate.step_ms / 1e3
        shown = {name: f"{value:.4g}" for name, value in means.items()}
        shown["questions/s"] = f"{rate.questions_per_s:.0f}"
        self.bar.set_postfix(shown)
        if self.bar.disable:
            logger.info(
                "%s step %d/%d %s, %.0f s left",
                trainer.phase.name,
                trainer.state.step,
                trainer.total_steps,
                ", ".join(f"{k} {v}" for k, v in shown.items()),
                left,
            )
        trainer.record(
            {
                "epoch": trainer.state.epoch,
                "train": means,
                "lr": trainer.scheduler.get_last_lr()[0],
                "questions_per_s": rate.questions_per_s,
                "facts_per_s": rate.facts_per_s,
                "tokens_per_s": rate.tokens_per_s,
                "peak_mem_gib": rate.peak_mem_gib,
            }
        )
