"""The only training loop."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_

from dragkit import __version__
from dragkit.checkpoint.checkpoint import (
    LoadedCheckpoint,
    Snapshot,
    TrainState,
    flatten_optimizer_state,
    mark_best,
    restore_optimizer_state,
    save_checkpoint,
)
from dragkit.config import TrainConfig
from dragkit.data.packed import QuestionBatch
from dragkit.distributed.rank_consistency import trained_fingerprint, weight_fingerprint
from dragkit.distributed.ranks import Ranks
from dragkit.errors import ConfigError, Interrupted, WriteError
from dragkit.eval.evaluate import evaluate
from dragkit.eval.report import Report
from dragkit.generator.lora.gradient_watch import AdapterNotTrainedError
from dragkit.observe.profiling import ProfileWindow, nvtx_range
from dragkit.observe.throughput import ThroughputMeter
from dragkit.trainer.anomaly import FiniteCheck
from dragkit.trainer.optim import build_optimizer, build_scheduler, trained_parameters
from dragkit.trainer.phase import STATE_FILE, Phase, StepOutput, with_counted_parts
from dragkit.trainer.progress import MetricsLog, Progress
from dragkit.trainer.question_dataset import QuestionDataset
from dragkit.trainer.resume import require_same_inputs
from dragkit.trainer.signals import StopSignal

logger = logging.getLogger(__name__)

MAX_FAILED_SAVES = 3


class Trainer:
    """Runs a phase over its data: epochs, optimizer steps, validation, checkpoints.

    Every random draw is a function of the seed and the step, so a resumed run repeats the
    uninterrupted one bit for bit.

    Args:
        config: the run's settings.
        phase: the phase to train.
        train, val: training and validation questions. Without `val` nothing is validated.
        run_dir: folder of checkpoints, metrics and configuration.
        device: device of the model.
        command_dir: folder that the user resumes. None means `run_dir`.
        ranks: ranks that train together. None means this process alone.
        stop: handler of stop signals. None means that nothing stops the training.
        inputs: fingerprints of what the run reads, by key of `TrainState.extra`.
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
        stop: StopSignal | None = None,
        inputs: Mapping[str, str] | None = None,
    ) -> None:
        self.config, self.phase, self.run_dir, self.device = config, phase, run_dir, device
        self.command_dir = command_dir or run_dir
        self.ranks = ranks or Ranks()
        self.stop = stop or StopSignal()
        self.failed_saves = 0
        self.unsaved: WriteError | None = None
        self.is_saved = True
        self.train_set, self.val_set = train, val
        self.relations = train.relations.to(device)
        self.epochs = config.optim.epochs_in(config.run.phase)
        self.total_steps = sum(self._steps_in_epoch(epoch) for epoch in range(self.epochs))
        self.optimizer = build_optimizer(phase.parameter_groups(), device)
        self.parameters = trained_parameters(self.optimizer)
        # The optimizer reorders parameters by group, so saved states are keyed by name.
        names = {id(p): name for name, p in phase.model.named_parameters()}
        self.parameter_names = [names[id(p)] for p in self.parameters]
        self.scheduler = build_scheduler(self.optimizer, config.optim, self.total_steps)
        self.inputs = {"data": train.store.fingerprint, **(inputs or {})}
        origin = {**self.inputs, "dragkit": __version__, "torch": torch.__version__}
        self.state = TrainState(
            phase=phase.name, epoch=0, step=0, batch=0, questions_seen=0, extra=origin
        )
        self.finite = FiniteCheck(
            run_dir,
            phase.model,
            dict(zip(self.parameter_names, self.parameters, strict=True)),
            self.optimizer,
            train.store,
            self.ranks,
            device,
            late=device.type != "cpu",
        )
        self.metrics = MetricsLog(run_dir, enabled=self.ranks.is_main)
        self.meter = ThroughputMeter(device)
        self.profile_window = ProfileWindow(
            config.run.profile_steps,
            run_dir if config.run.profile_trace and self.ranks.is_main else None,
        )

    def _steps_in_epoch(self, epoch: int) -> int:
        num_batches = len(self.train_set.batch_sampler.batches(epoch))
        return math.ceil(num_batches / self.config.optim.accumulation_steps)

    def resume(self, loaded: LoadedCheckpoint) -> None:
        """Restores weights, optimizer, schedule and position from a checkpoint of this phase.

        Raises:
            CheckpointError: its weights do not fit, or its run had other inputs.
            ConfigError: the run has more steps than are to be trained.
        """
        require_same_inputs(
            loaded,
            self.inputs,
            "Name the first command's, or start a new run in another folder.",
        )
        if loaded.state.step > self.total_steps:
            raise ConfigError(
                f"optim.epochs: {self.epochs} epochs have {self.total_steps} steps, but "
                f"{loaded.folder} has done {loaded.state.step}. Train at least as many epochs."
            )
        self.phase.load(loaded)
        restore_optimizer_state(self.optimizer, self.parameter_names, loaded.tensors["optim"])
        self.state = replace(loaded.state, extra={**loaded.state.extra, **self.inputs})
        saved = loaded.json["config"]["run"]  # type: ignore[index, call-overload]
        if saved["val_generation"] != self.config.run.val_generation:
            # `val_generation` selects the metric, so the best value is not comparable any more.
            self.state = replace(self.state, best=None)
        self.scheduler = build_scheduler(
            self.optimizer, self.config.optim, self.total_steps, done=self.state.step
        )

    def fit(self) -> TrainState:
        """Trains to the last epoch and returns the final state.

        Raises:
            Interrupted: a stop signal came. The state has been saved.
            NumericalError: a loss or a gradient was not finite. The step was not applied.
            WriteError: checkpoints cannot be written, three times in a row or at the end.
        """
        # A run that a kill ended has logged steps that this one repeats.
        self.metrics.drop_after(self.state.step)
        self._require_same(weight_fingerprint)
        progress = Progress(
            self.phase.name,
            (self.state.step, self.total_steps),
            self.config.run.log_every_steps,
            self.meter,
            self.metrics,
            self.ranks,
        )
        save_every = self.config.run.save_every_steps
        with self.stop.deferred(), progress, self.profile_window, self.metrics:
            if self.state.epoch and not self.state.batch:
                # The checkpoint of an epoch is older than its validation.
                self._validate_epoch()
            while self.state.epoch < self.epochs:
                for batches in self._steps():
                    self.profile_window.tick(self.state.step)
                    outputs = self.train_step(batches)
                    if progress.reads_at(self.state.step):
                        self.finite.settle()
                    progress.step(outputs, self.state, self.scheduler.get_last_lr()[0])
                    # Several ranks stop in `_reduce_counts`, which sums the signals of all of them.
                    if self.stop.requested and self.ranks.is_single:
                        self._interrupt()
                    if save_every and self.state.step % save_every == 0:
                        self.save()
                self.end_epoch()
        if self.unsaved is not None:
            raise self.unsaved
        return self.state

    def _require_same(self, fingerprint: Callable[[nn.Module], dict[str, str]]) -> None:
        """Raises where the ranks differ in the step or the fingerprint of the weights."""
        self.ranks.progress = f"at step {self.state.step}"
        if not self.ranks.is_single:
            self.ranks.require_same({"step": self.state.step, **fingerprint(self.phase.model)})

    def _interrupt(self, *, save: bool = True) -> None:
        if save:
            self.save()
        if self.unsaved is not None:
            raise self.unsaved
        raise Interrupted(
            f"stopped at step {self.state.step} of {self.total_steps} and saved in {self.run_dir}. "
            f"Continue with the same command and --resume {shlex.quote(str(self.command_dir))}"
        )

    def load_batches(self, batches: Sequence[Sequence[int]]) -> Iterator[QuestionBatch]:
        """Collated training batches for this phase, see `QuestionDataset.load`."""
        return self.train_set.load(
            batches, self.device, to_device=not self.phase.takes_host_batches
        )

    def _steps(self) -> Iterator[list[QuestionBatch | None]]:
        """Yields the micro-batches of each optimizer step for the rest of the current epoch.

        Each rank has its slice of every batch. An empty slice is None.
        """
        batches = self.train_set.batch_sampler.batches(self.state.epoch)[self.state.batch :]
        local_slices = self.ranks.local_slices(batches)
        loaded = self.load_batches([rows for rows in local_slices if rows])
        microbatches = (next(loaded) if rows else None for rows in local_slices)
        while step := list(islice(microbatches, self.config.optim.accumulation_steps)):
            yield step

    def _reduce_counts(self, batches: list[QuestionBatch]) -> tuple[dict[str, int], int]:
        """Sums the step's counts and questions over ranks. All ranks stop if one has a signal."""
        self.ranks.progress = f"at step {self.state.step}"
        counts = self.phase.counts(batches)
        questions = sum(batch.graph.num_graphs for batch in batches)
        stop = int(self.stop.requested)
        # One reduction for all host numbers of a step, because each one is a round trip.
        *sums, questions, stopping = self.ranks.all_reduce_sum([*counts.values(), questions, stop])
        if stopping and not self.ranks.is_single:
            self._interrupt()
        return dict(zip(counts, sums, strict=True)), questions

    def train_step(self, batches: Sequence[QuestionBatch | None]) -> list[StepOutput]:
        """Runs one optimizer step over its micro-batches. None is an empty slice of a batch."""
        present = [batch for batch in batches if batch is not None]
        counts, questions = self._reduce_counts(present)
        denominators = {name: float(max(count, 1)) for name, count in counts.items()}
        self.phase.model.train()
        # Dropout alone draws from torch's generator. Seeding it here makes dropout a function of
        # seed, step and rank, as resuming needs.
        torch.manual_seed((self.config.run.seed << 32) + (self.ranks.rank << 24) + self.state.step)
        outputs = [
            self.phase.idle_step(self.device)
            if batch is None
            else self.phase.training_step(batch, self.relations, denominators, self.state.step)
            for batch in batches
        ]
        with nvtx_range("optimizer"):
            # Sum over ranks first: norm and clipping are those of the whole batch's gradient.
            self.ranks.all_reduce_gradients(self.parameters)
            rows = [row for batch in present for row in batch.rows]
            norm = self.finite.check(self.state.step, rows, outputs)
            clip_grads_with_norm_(self.parameters, self.config.optim.grad_clip, norm)
            try:
                self.phase.check_gradients(counts)
            except AdapterNotTrainedError:
                # An infinite loss has gradients of 0, which say nothing of the adapters.
                self.finite.settle()
                raise
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.meter.add(
            sum(o.num_questions for o in outputs),
            sum(o.num_facts for o in outputs),
            sum(o.num_tokens for o in outputs),
        )
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            batch=self.state.batch + len(batches),
            questions_seen=self.state.questions_seen + questions,
        )
        return [with_counted_parts(out, counts) for out in outputs]

    def end_epoch(self) -> None:
        """Advances to the next epoch, saves, validates."""
        self.state = replace(self.state, epoch=self.state.epoch + 1, batch=0)
        self.save()
        self._interrupt_if_requested()
        self._validate_epoch()
        # A signal after the last validation comes too late to interrupt anything.
        if self.state.epoch < self.epochs:
            self._interrupt_if_requested()

    def _interrupt_if_requested(self) -> None:
        (stopping,) = self.ranks.all_reduce_sum([int(self.stop.requested)])
        if stopping:
            self._interrupt(save=False)

    def _validate_epoch(self) -> None:
        """Validates the epoch of the newest checkpoint, and marks that as the best if it is."""
        if self.val_set is None:
            return
        with self.stop.deferred(False):
            score = self.phase.score(self.validate().means)
        best = self.state.best
        # The best is a checkpoint. An epoch that could not be saved must not shadow a later one.
        if not self.is_saved or score is None or (best is not None and score <= best):
            return
        if self._on_main(lambda: mark_best(self.run_dir, self.state.step)):
            self.state = replace(self.state, best=score)

    def validate(self) -> Report:
        """Evaluates on the validation questions and logs the metrics."""
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
        epoch, means = self.state.epoch, result.report.means
        self.metrics.append(self.state.step, {"epoch": epoch, "validation": means})
        logger.info("epoch %d: %s", epoch, result.summary_line())
        return result.report

    def save(self) -> None:
        """Writes a checkpoint with everything that `resume` needs. Only rank 0 writes.

        Raises:
            NumericalError: the last step is not finite.
            WriteError: `MAX_FAILED_SAVES` saves in a row have failed.
        """
        self.finite.settle()
        self._require_same(trained_fingerprint)
        self.is_saved = self._on_main(self._write_checkpoint)
        if self.is_saved:
            self.failed_saves = 0

    def _on_main(self, write: Callable[[], object]) -> bool:
        """Calls `write` on rank 0, and returns on all ranks whether it has written."""
        self.unsaved = None
        if self.ranks.is_main:
            try:
                write()
            except WriteError as error:
                # A disk that is full for a while must not end a long run.
                self.unsaved = error
                self.failed_saves += 1
                if self.failed_saves >= MAX_FAILED_SAVES:
                    raise
                logger.warning(
                    "%s\n  training continues (%d failed saves)", error, self.failed_saves
                )
        return self.ranks.all_gather_object(self.unsaved is None)[0]

    def _write_checkpoint(self) -> None:
        adapter = self.phase.adapter_writer()
        snapshot = Snapshot(
            tensors={
                STATE_FILE: self.phase.trainable_state(),
                "optim": flatten_optimizer_state(self.optimizer, self.parameter_names),
            },
            folders={} if adapter is None else {"adapter": adapter},
            json={"config": self.config.model_dump(mode="json")},
        )
        save_checkpoint(
            self.run_dir,
            self.state.step,
            snapshot,
            self.state,
            keep=self.config.run.keep_checkpoints,
        )
