"""The only training loop."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dragkit import __version__
from dragkit.checkpoint.atomic import make_dirs, write_text_atomically
from dragkit.checkpoint.checkpoint import (
    LoadedCheckpoint,
    Snapshot,
    TrainState,
    flatten_optimizer_state,
    restore_optimizer_state,
    save_checkpoint,
)
from dragkit.config import TrainConfig, dump_config
from dragkit.data.packed import QuestionBatch
from dragkit.distributed.rank_consistency import trained_fingerprint, weight_fingerprint
from dragkit.distributed.ranks import Ranks
from dragkit.errors import CheckpointError, Interrupted, WriteError
from dragkit.eval.evaluate import evaluate
from dragkit.eval.report import Report
from dragkit.observe.profiling import ProfileWindow, nvtx_range
from dragkit.observe.throughput import ThroughputMeter
from dragkit.trainer.anomaly import numerical_error
from dragkit.trainer.optim import build_optimizer, build_scheduler, trained_parameters
from dragkit.trainer.phase import Phase, StepOutput
from dragkit.trainer.progress import Progress
from dragkit.trainer.question_dataset import QuestionDataset
from dragkit.trainer.signals import StopSignal

logger = logging.getLogger(__name__)

MAX_FAILED_SAVES = 3


class Trainer:
    """Runs a phase over its data: epochs, optimizer steps, validation, checkpoints.

    Every random draw is a function of the seed and the step, so a resumed run continues exactly
    where the interrupted one would have gone.

    Args:
        config: of the run; phase: what is trained.
        train, val: data; `val` may be None.
        run_dir: where checkpoints, metrics and the configuration go.
        device: where the models are.
        command_dir: the folder that `--resume` is given; None means `run_dir`.
        ranks: those that train together; None means this process alone.
    """

    def __init__(
        self,
        config: TrainConfig,
        phase: Phase,
        train: QuestionDataset,
        val: QuestionDataset | None,
        run_dir: Path,
        device: torch.device,
        *,
        command_dir: Path | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.phase, self.run_dir, self.device = config, phase, run_dir, device
        self.command_dir = command_dir or run_dir
        self.ranks = ranks or Ranks()
        self.stop: StopSignal | None = None
        self.failed_saves = 0
        self.train_set, self.val_set = train, val
        self.relations = train.relations.to(device)
        self.epochs = config.optim.epochs_in(config.run.phase)
        steps = [self._steps_in_epoch(epoch) for epoch in range(self.epochs)]
        self.total_steps = sum(steps)
        self.optimizer = build_optimizer(phase.parameter_groups(), device)
        self.parameters = trained_parameters(self.optimizer)
        names = {id(p): name for name, p in phase.model.named_parameters()}
        self.names = [names[id(p)] for p in self.parameters]
        self.scheduler = build_scheduler(self.optimizer, config.optim, self.total_steps)
        self.state = TrainState(
            phase=phase.name,
            epoch=0,
            step=0,
            batch=0,
            questions_seen=0,
            best=None,
            extra={
                "data": train.store.fingerprint,
                "dragkit": __version__,
                "torch": torch.__version__,
            },
        )
        self.meter = ThroughputMeter(device)
        self.window = ProfileWindow(
            config.run.profile_steps,
            run_dir if config.run.profile_trace and self.ranks.is_main else None,
        )

    def _steps_in_epoch(self, epoch: int) -> int:
        return math.ceil(
            len(self.train_set.batch_sampler.batches(epoch)) / self.config.optim.accumulation_steps
        )

    def resume(self, loaded: LoadedCheckpoint) -> None:
        """Continues from a checkpoint of this phase: weights, optimizer, schedule, position.

        Raises:
            CheckpointError: its weights do not fit, or it was trained on other questions.
        """
        if loaded.state.extra.get("data") != self.train_set.store.fingerprint:
            raise CheckpointError(
                f"{loaded.folder}: was trained on other questions than {self.train_set.path} now "
                "holds, so it cannot be continued. Start a new run in another folder."
            )
        self.phase.load(loaded)
        restore_optimizer_state(self.optimizer, self.names, loaded.tensors["optim"])
        self.state = loaded.state
        saved = loaded.json["config"]["run"]  # type: ignore[index, call-overload]
        if saved["val_generation"] != self.config.run.val_generation:
            # The best value so far is of another metric than those to come.
            self.state = replace(self.state, best=None)
        self.scheduler = build_scheduler(
            self.optimizer, self.config.optim, self.total_steps, done=self.state.step
        )
        if self.ranks.is_main:
            self._forget_after(self.state.step)

    def _forget_after(self, step: int) -> None:
        """Drops log lines of steps that are about to be done again."""
        path = self.run_dir / "metrics.jsonl"
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [
                line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step
            ]
            write_text_atomically(path, "".join(kept))

    def fit(self) -> TrainState:
        """Trains to the last epoch and returns the final state.

        Raises:
            Interrupted: a stop signal came; the state is saved.
            NumericalError: a loss or gradient was not finite; nothing was updated by it.
        """
        if self.ranks.is_main:
            make_dirs(self.run_dir)
        self._require_same(weight_fingerprint)
        progress = Progress(
            self.phase.name,
            self.total_steps,
            done=self.state.step,
            every=self.config.run.log_every_steps,
            meter=self.meter,
            record=self.record,
            ranks=self.ranks,
        )
        with StopSignal() as stop, progress, self.window:
            self.stop = stop
            while self.state.epoch < self.epochs:
                for batches in self._steps():
                    self.window.tick(self.state.step)
                    outputs = self.train_step(batches)
                    progress.step(outputs, self.state, self.scheduler.get_last_lr()[0])
                    every = self.config.run.save_every_steps
                    if stop.requested and self.ranks.is_single:
                        self._interrupted()
                    if every and self.state.step % every == 0:
                        self.save(is_best=False)
                self.end_epoch()
                (stopping,) = self.ranks.all_reduce_sum([int(stop.requested)])
                if stopping and self.state.epoch < self.epochs:
                    self._interrupted(saved=True)
        return self.state

    def _require_same(self, fingerprint: Callable[[nn.Module], dict[str, str]]) -> None:
        """Stops where the ranks do not stand at the same step with the same weights."""
        self.ranks.progress = f"at step {self.state.step}"
        if not self.ranks.is_single:
            self.ranks.require_same({"step": self.state.step, **fingerprint(self.phase.model)})

    def _interrupted(self, *, saved: bool = False) -> None:
        if not saved:
            self.save(is_best=False)
        raise Interrupted(
            f"stopped at step {self.state.step} of {self.total_steps} and saved in {self.run_dir}. "
            f"Continue with the same command and --resume {self.command_dir}"
        )

    def _steps(self) -> Iterator[list[QuestionBatch | None]]:
        """The rest of the current epoch, as the micro-batches of one optimizer step each.

        Of several ranks, each has its slice of every batch, and None where that is empty.
        """
        rows = self.ranks.local_slices(
            self.train_set.batch_sampler.batches(self.state.epoch)[self.state.batch :]
        )
        loaded = self.train_set.load([own for own in rows if own], self.device)
        batches = (next(loaded) if own else None for own in rows)
        while window := list(islice(batches, self.config.optim.accumulation_steps)):
            yield window

    def _agree(self, batches: list[QuestionBatch]) -> tuple[dict[str, int], int]:
        """Counts of the step and its questions over all ranks; all stop where one is asked to."""
        self.ranks.progress = f"at step {self.state.step}"
        own = self.phase.counts(batches)
        questions = sum(batch.graph.num_graphs for batch in batches)
        stop = self.stop is not None and self.stop.requested
        *sums, questions, stopping = self.ranks.all_reduce_sum(
            [*own.values(), questions, int(stop)]
        )
        if stopping and not self.ranks.is_single:
            self._interrupted()
        return dict(zip(own, sums, strict=True)), questions

    def train_step(self, batches: Sequence[QuestionBatch | None]) -> list[StepOutput]:
        """One optimizer step over its micro-batches."""
        present = [batch for batch in batches if batch is not None]
        counts, questions = self._agree(present)
        divisors = {name: float(max(count, 1)) for name, count in counts.items()}
        self.phase.model.train()
        # Dropout is the only draw from torch's own generator; seeding it per step makes it, too,
        # a function of (seed, step); and of the rank, lest ranks drop alike.
        torch.manual_seed((self.config.run.seed << 32) + (self.ranks.rank << 24) + self.state.step)
        outputs = [
            self.phase.idle_step(self.device)
            if batch is None
            else self.phase.training_step(batch, self.relations, divisors, self.state.step)
            for batch in batches
        ]
        with nvtx_range("optimizer"):
            self.ranks.all_reduce_gradients(self.parameters)
            norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
            self._check_finite(norm, present, outputs)
            clip_grads_with_norm_(self.parameters, self.config.optim.grad_clip, norm)
            self.phase.check_gradients(counts)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.meter.add(
            sum(o.num_questions for o in outputs),
            sum(o.num_facts for o in outputs),
            sum(o.num_tokens for o in outputs),
        )
        state = self.state
        self.state = replace(
            state,
            step=state.step + 1,
            batch=state.batch + len(batches),
            questions_seen=state.questions_seen + questions,
        )
        return outputs

    def _check_finite(
        self, norm: Tensor, batches: list[QuestionBatch], outputs: list[StepOutput]
    ) -> None:
        """Stops before an update that would ruin the weights."""
        if self.device.type != "cpu":
            # Asked on the device, so that the host does not wait for every step.
            torch._assert_async(torch.isfinite(norm))
            return
        if math.isfinite(float(norm)):
            return
        questions = [
            self.train_set.store.question(row).id for batch in batches for row in batch.rows
        ]
        path = self.run_dir / f"anomaly-{self.state.step:08d}.json"
        error = numerical_error(
            path,
            self.state.step,
            float(norm),
            dict(zip(self.names, self.parameters, strict=True)),
            questions,
            outputs,
            self.ranks,
        )
        self.optimizer.zero_grad(set_to_none=True)
        raise error

    def end_epoch(self) -> None:
        """Validates, moves to the next epoch, saves."""
        self.state = replace(self.state, epoch=self.state.epoch + 1, batch=0)
        best = False
        if self.val_set is not None:
            report = self.validate()
            score = self.phase.score(report.means)
            best = score is not None and (self.state.best is None or score > self.state.best)
            if best:
                self.state = replace(self.state, best=score)
        self.save(is_best=best)

    def validate(self) -> Report:
        """Metrics on the validation questions, logged."""
        result = evaluate(
            self.phase,
            self.val_set,
            self.device,
            limit=self.phase.validation_limit,
            generate=self.phase.validates_answers,
            ranks=self.ranks,
        )
        for line in result.sample_lines(self.config.run.val_log_samples):
            logger.info(line)
        self.record({"epoch": self.state.epoch, "validation": result.report.means})
        logger.info("epoch %d: %s", self.state.epoch, result.summary_line())
        return result.report

    def record(self, entry: dict) -> None:
        """Appends a line to metrics.jsonl."""
        if not self.ranks.is_main:
            return
        with (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.state.step, **entry}) + "\n")

    def save(self, *, is_best: bool) -> None:
        """Writes a checkpoint of everything that `resume` needs; the first rank does.

        A disk that is full for a while must not end a long run: training goes on after a failed
        save, and gives up at the third in a row.

        Raises:
            WriteError: three saves in a row have failed.
        """
        self._require_same(trained_fingerprint)
        if self.ranks.is_main:
            self._save_or_go_on(is_best=is_best)
        self.ranks.barrier()

    def _save_or_go_on(self, *, is_best: bool) -> None:
        try:
            self._save(is_best=is_best)
            self.failed_saves = 0
        except WriteError as error:
            self.failed_saves += 1
            if self.failed_saves >= MAX_FAILED_SAVES:
                raise
            logger.warning("%s\n  training goes on (%d failed saves)", error, self.failed_saves)

    def _save(self, *, is_best: bool) -> None:
        heads, folders = self.phase.trainable_state(), {}
        if (adapter := self.phase.adapter_writer()) is not None:
            folders["adapter"] = adapter
        snapshot = Snapshot(
            tensors={
                "heads": heads,
                "optim": flatten_optimizer_state(self.optimizer, self.names),
            },
            folders=folders,
            json={"config": self.config.model_dump(mode="json")},
        )
        write_text_atomically(self.run_dir / "config.yaml", dump_config(self.config))
        save_checkpoint(
            self.run_dir,
            self.state.step,
            snapshot,
            self.state,
            keep=self.config.run.keep_checkpoints,
            is_best=is_best,
        )
