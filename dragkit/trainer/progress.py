"""What a run shows while it goes: a bar on a terminal, a line every N steps elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import torch
from tqdm import tqdm

from dragkit.checkpoint.checkpoint import TrainState
from dragkit.distributed.ranks import Ranks
from dragkit.observe.throughput import Throughput, ThroughputMeter
from dragkit.trainer.compile import num_compiled_graphs
from dragkit.trainer.phase import StepOutput

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
    """Reads the step's tensors only every `every` steps, since reading waits for them.

    Args:
        phase: its name, for the bar and the log.
        total_steps, done: optimizer steps of the whole run, and those before this process.
        every: steps between two entries.
        meter: counts the work of this rank.
        record: appends an entry to metrics.jsonl.
        ranks: whose entries are put together; the first one shows them.
    """

    def __init__(
        self,
        phase: str,
        total_steps: int,
        *,
        done: int,
        every: int,
        meter: ThroughputMeter,
        record: Callable[[dict], None],
        ranks: Ranks,
    ) -> None:
        self.phase, self.total_steps, self.every = phase, total_steps, every
        self.meter, self.record, self.ranks = meter, record, ranks
        self._done = done
        self._parts: list[dict[str, torch.Tensor]] = []
        self._questions = 0

    def __enter__(self) -> Progress:
        self.bar = tqdm(
            total=self.total_steps,
            initial=self._done,
            desc=self.phase,
            unit="step",
            disable=not (sys.stderr.isatty() and self.ranks.is_main),
            dynamic_ncols=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def step(self, outputs: list[StepOutput], state: TrainState, lr: float) -> None:
        """Counts one optimizer step.

        Args:
            outputs: of its micro-batches; state: after the step; lr: of the next one.
        """
        self._parts.append(_sum_over_micro_batches(outputs))
        self._questions += sum(out.num_questions for out in outputs)
        self.bar.update(1)
        if state.step % self.every and state.step != self.total_steps:
            return
        names = dict.fromkeys(name for part in self._parts for name in part)
        means = {
            name: float(torch.stack([p[name].float() for p in self._parts if name in p]).mean())
            for name in names
        }
        rate = self.meter.read()
        everyone = self.ranks.all_gather_object((means, self._questions, rate))
        self._parts.clear()
        self._questions = 0
        if not self.ranks.is_main:
            return
        if len(everyone) > 1:
            means, rate = _of_all_ranks(everyone)
        self._show(means, rate, state.step)
        self.record(
            {
                "epoch": state.epoch,
                "train": means,
                "lr": lr,
                "questions_per_s": rate.questions_per_s,
                "facts_per_s": rate.facts_per_s,
                "tokens_per_s": rate.tokens_per_s,
                "peak_mem_gib": rate.peak_mem_gib,
                "compiled_graphs": num_compiled_graphs(),
            }
        )

    def _show(self, means: dict[str, float], rate: Throughput, step: int) -> None:
        shown = {name: f"{value:.4g}" for name, value in means.items()}
        shown["questions/s"] = f"{rate.questions_per_s:.0f}"
        self.bar.set_postfix(shown)
        if self.bar.disable:
            logger.info(
                "%s step %d/%d %s, %.0f s left",
                self.phase,
                step,
                self.total_steps,
                ", ".join(f"{k} {v}" for k, v in shown.items()),
                (self.total_steps - step) * rate.step_ms / 1e3,
            )


def _sum_over_micro_batches(outputs: list[StepOutput]) -> dict[str, torch.Tensor]:
    """One step's scalars: loss and shares are added up, the others averaged."""
    total = {"loss": sum(out.loss for out in outputs)}
    for name in dict.fromkeys(name for out in outputs for name in out.parts):
        found = [out.parts[name] for out in outputs if name in out.parts]
        total[name] = sum(found)
        if name not in _SHARES:
            total[name] = total[name] / len(found)
    return total
