"""Reports of a run: metrics.jsonl, and a bar on a terminal or a log line every N steps."""

from __future__ import annotations

import json
import logging
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dragkit.checkpoint.atomic import write_text_atomically
from dragkit.checkpoint.checkpoint import TrainState
from dragkit.distributed.ranks import Ranks
from dragkit.errors import WriteError
from dragkit.observe.throughput import Throughput, ThroughputMeter
from dragkit.trainer.compile import num_compiled_graphs
from dragkit.trainer.phase import StepOutput

logger = logging.getLogger(__name__)

# Parts that add up over micro-batches and ranks. All others are averaged.
_SUMMED = ("loss", "retrieval", "generator", "token_accuracy")

Means = dict[str, float]


class MetricsLog:
    """metrics.jsonl, one JSON object per line with its optimizer step. Only rank 0 enables it.

    A full disk does not end a run. Lines that cannot be written wait for the next one. Those that
    still wait at the end of its `with` block are counted in a warning.
    """

    def __init__(self, run_dir: Path, *, enabled: bool) -> None:
        self.path, self.enabled = run_dir / "metrics.jsonl", enabled
        self._waiting = b""

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._waiting and (error := self._write()) is not None:
            lines = self._waiting.count(b"\n")
            logger.warning("%s: the last %d lines are lost (%s)", self.path, lines, error)

    def append(self, step: int, entry: dict) -> None:
        """Appends one entry."""
        if not self.enabled:
            return
        is_first = not self._waiting
        self._waiting += f"{json.dumps({'step': step, **entry})}\n".encode()
        if (error := self._write()) is not None and is_first:
            logger.warning(
                "%s: cannot be written (%s). Training continues, and its lines wait",
                self.path,
                error,
            )

    def _write(self) -> OSError | None:
        """Writes what waits, and returns the error that prevented some of it."""
        try:
            with self.path.open("ab", buffering=0) as file:
                while self._waiting:
                    # A disk that becomes full takes a part of a line. The rest follows later.
                    self._waiting = self._waiting[file.write(self._waiting) :]
        except OSError as error:
            return error
        return None

    def drop_after(self, step: int) -> None:
        """Keeps the training lines up to a step and the validations before it.

        A run repeats the others. A line that is not whole is dropped too.

        Raises:
            WriteError: the file cannot be replaced.
        """
        if not self.enabled or not self.path.is_file():
            return
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _is_before(line, step)]
            write_text_atomically(self.path, b"".join(kept).decode())
        except OSError as error:
            raise WriteError(
                f"{self.path}: cannot be replaced: {error.strerror}. Free some space, or start a "
                "new run in another folder."
            ) from error


def _is_before(line: bytes, step: int) -> bool:
    try:
        entry = json.loads(line)
        return line.endswith(b"\n") and (entry["step"], "validation" in entry) < (step, True)
    except (ValueError, TypeError, KeyError):
        return False


class Progress:
    """Shows and logs the means of the last `every` optimizer steps.

    Reading a tensor waits for the device, so tensors are read every `every` steps only. Rank 0
    shows the merged entries of all ranks.

    Args:
        phase: name of the phase.
        steps: optimizer steps done before this process, and those of the whole run.
        every: optimizer steps between two entries.
        meter, metrics, ranks: those of the trainer.
    """

    def __init__(
        self,
        phase: str,
        steps: tuple[int, int],
        every: int,
        meter: ThroughputMeter,
        metrics: MetricsLog,
        ranks: Ranks,
    ) -> None:
        self.phase, self.every = phase, every
        self.meter, self.metrics, self.ranks = meter, metrics, ranks
        self._done, self.total_steps = steps
        self._steps: list[dict[str, Tensor]] = []
        self._questions = 0

    def __enter__(self) -> Progress:
        # tqdm's own lock spans processes. Of a run that is killed it would leave a semaphore, of
        # which Python then warns.
        tqdm.set_lock(threading.RLock())
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

    def reads_at(self, step: int) -> bool:
        """Whether `step` reads the device after that optimizer step."""
        return step % self.every == 0 or step == self.total_steps

    def step(self, outputs: list[StepOutput], state: TrainState, lr: float) -> None:
        """Counts one optimizer step. `state` is the state after it, `lr` the next rate."""
        self._steps.append(_reduce_microbatches(outputs))
        self._questions += sum(out.num_questions for out in outputs)
        self.bar.update(1)
        if not self.reads_at(state.step):
            return
        names = dict.fromkeys(name for parts in self._steps for name in parts)
        # A part may be absent from some steps, such as the gradient norms.
        means = {
            name: float(torch.stack([p[name].float() for p in self._steps if name in p]).mean())
            for name in names
        }
        rate = self.meter.read()
        all_entries = self.ranks.all_gather_object((means, self._questions, rate))
        self._steps.clear()
        self._questions = 0
        if not self.ranks.is_main:
            return
        if len(all_entries) > 1:
            means, rate = _reduce_ranks(all_entries)
        self._show(means, rate, state.step)
        entry = {"epoch": state.epoch, "train": means, "lr": lr, **asdict(rate)}
        del entry["step_ms"]
        entry["compiled_graphs"] = num_compiled_graphs()
        self.metrics.append(state.step, entry)

    def _show(self, means: Means, rate: Throughput, step: int) -> None:
        shown = {name: f"{value:.4g}" for name, value in means.items()}
        shown["questions/s"] = f"{rate.questions_per_s:.0f}"
        self.bar.set_postfix(shown)
        if self.bar.disable:
            values = ", ".join(f"{k} {v}" for k, v in shown.items())
            seconds = (self.total_steps - step) * rate.step_ms / 1e3
            steps = f"{step}/{self.total_steps}"
            logger.info("%s step %s %s, %.0f s left", self.phase, steps, values, seconds)


def _reduce_microbatches(outputs: list[StepOutput]) -> dict[str, Tensor]:
    """The scalars of one optimizer step from those of its micro-batches."""
    entries = [{"loss": out.loss, **out.parts} for out in outputs]
    if not any(name in entry for entry in entries for name in ("retrieval", "generator")):
        # A loss that is the sum of no term.
        entries = [out.parts for out in outputs]
    reduced = {}
    for name in dict.fromkeys(name for entry in entries for name in entry):
        values = [entry[name] for entry in entries if name in entry]
        reduced[name] = sum(values) if name in _SUMMED else sum(values) / len(values)
    return reduced


def _reduce_ranks(entries: list[tuple[Means, int, Throughput]]) -> tuple[Means, Throughput]:
    """Merges means, questions and rates of all ranks. Averages are weighted by questions."""
    reduced: Means = {}
    for name in dict.fromkeys(name for means, _, _ in entries for name in means):
        values = [(means[name], questions) for means, questions, _ in entries if name in means]
        if name in _SUMMED:
            reduced[name] = sum(value for value, _ in values)
        else:
            weighted = sum(value * questions for value, questions in values)
            reduced[name] = weighted / max(sum(questions for _, questions in values), 1)
    # Ranks step together, so any rank's step time is everyone's.
    rates = [rate for _, _, rate in entries]
    return reduced, Throughput(
        questions_per_s=sum(rate.questions_per_s for rate in rates),
        facts_per_s=sum(rate.facts_per_s for rate in rates),
        tokens_per_s=sum(rate.tokens_per_s for rate in rates),
        step_ms=rates[0].step_ms,
        peak_mem_gib=max(rate.peak_mem_gib for rate in rates),
    )
