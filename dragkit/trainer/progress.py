"""What a run shows while it goes: a bar on a terminal, a line every N steps elsewhere."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from dragkit.observe.throughput import Throughput
from dragkit.trainer.compile import compiled_graphs
from dragkit.trainer.phase import StepOutput

if TYPE_CHECKING:
    from dragkit.trainer.loop import Trainer

logger = logging.getLogger(__name__)

# Parts that add up over the micro-batches of a step; the others are averaged.
_SHARES = ("retrieval", "generator", "token_accuracy")


def _of_all_ranks(
    everyone: list[tuple[dict[str, float], int, Throughput]],
) -> tuple[dict[str, float], Throughput]:
    """One log entry from those of all ranks: means, questions behind them, and rates."""
    means: dict[str, float] = {}
    for name in dict.fromkeys(name for own, _, _ in everyone for name in own):
        found = [(own[name], questions) for own, questions, _ in everyone if name in own]
        means[name] = sum(value for value, _ in found)
        if name not in ("loss", *_SHARES):
            weighted = sum(value * questions for value, questions in found)
            means[name] = weighted / max(sum(questions for _, questions in found), 1)
    rates = [rate for _, _, rate in everyone]
    return means, Throughput(
        questions_per_s=sum(rate.questions_per_s for rate in rates),
        facts_per_s=sum(rate.facts_per_s for rate in rates),
        tokens_per_s=sum(rate.tokens_per_s for rate in rates),
        step_ms=rates[0].step_ms,
        peak_mem_gib=max(rate.peak_mem_gib for rate in rates),
    )


class Progress:
    """Reads the step's tensors only every `log_every_steps` steps, since reading waits for them."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.every = trainer.config.run.log_every_steps
        self._parts: list[dict[str, torch.Tensor]] = []
        self._questions = 0

    def __enter__(self) -> Progress:
        self.bar = tqdm(
            total=self.trainer.total_steps,
            initial=self.trainer.state.step,
            desc=self.trainer.phase.name,
            unit="step",
            disable=not (sys.stderr.isatty() and self.trainer.ranks.first),
            dynamic_ncols=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def step(self, outputs: list[StepOutput]) -> None:
        """To be called after every optimizer step."""
        trainer = self.trainer
        total = {"loss": sum(out.loss for out in outputs)}
        for name in dict.fromkeys(name for out in outputs for name in out.parts):
            found = [out.parts[name] for out in outputs if name in out.parts]
            total[name] = sum(found)
            if name not in _SHARES:
                total[name] = total[name] / len(found)
        self._parts.append(total)
        self._questions += sum(out.num_questions for out in outputs)
        self.bar.update(1)
        if trainer.state.step % self.every and trainer.state.step != trainer.total_steps:
            return
        names = dict.fromkeys(name for part in self._parts for name in part)
        means = {
            name: float(torch.stack([p[name].float() for p in self._parts if name in p]).mean())
            for name in names
        }
        rate = trainer.meter.read()
        everyone = trainer.ranks.gather((means, self._questions, rate))
        self._parts.clear()
        self._questions = 0
        if not trainer.ranks.first:
            return
        if len(everyone) > 1:
            means, rate = _of_all_ranks(everyone)
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
                "compiled_graphs": compiled_graphs(),
            }
        )
