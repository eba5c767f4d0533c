"""A training run from configuration to result: data, models, phases, evaluation."""

from __future__ import annotations

import logging
import shlex
from contextlib import nullcontext
from pathlib import Path

import torch

from dragkit.checkpoint.checkpoint import LoadedCheckpoint, RunInUseError, RunLock, load_checkpoint
from dragkit.config import TrainConfig
from dragkit.distributed.rank_consistency import check_batch_size, run_fingerprint
from dragkit.distributed.ranks import Ranks
from dragkit.errors import Interrupted, Stopped
from dragkit.generator.load import check_generator, within_positions
from dragkit.generator.random_weights import is_random
from dragkit.trainer.build import (
    build_joint,
    build_retriever,
    build_retriever_phase,
    num_shards,
    setup_process,
    with_memory_plan,
)
from dragkit.trainer.inputs import RunInputs
from dragkit.trainer.loop import Trainer
from dragkit.trainer.phase2 import CascadeBaseline
from dragkit.trainer.question_dataset import evaluation_batch_size
from dragkit.trainer.results_table import ResultsTable
from dragkit.trainer.resume import (
    adopt_saved,
    explicit_keys,
    resolve_checkpoint,
    saved_config,
    with_absolute_paths,
    with_values,
)
from dragkit.trainer.run_folder import (
    PHASE1,
    ContinuedRun,
    checkpoint_names,
    claim_run_dir,
    continued_run,
    refuse_blocked_files,
    refuse_used_folder,
    resume_dir,
    write_settings,
)
from dragkit.trainer.signals import StopSignal

logger = logging.getLogger(__name__)

_PHASE1_EVALUATION_BATCH = 64
_AFTER_DEMO = """
  your own questions: python -m dragkit.train --phase 2 --preset tiny --generator_model tiny \
--heuristics_path FILE.jsonl
  the 30B (one H200 or B200, after hf download unsloth/Nemotron-3-Nano-30B-A3B): \
python -m dragkit.train --phase 2 --preset h200 --heuristics_path FILE.jsonl"""


class TrainingRun:
    """One `python -m dragkit.train` command.

    Args:
        config: merged configuration.
        origins: where the value of each dotted key came from.
        phase1_config: for the phase 1 that phase 2 trains first where no checkpoint is named.
        ranks: ranks that train together. None means this process alone.
        stop: handler of stop signals, already entered. None enters one in `execute`.

    Raises:
        ConfigError: settings or ranks contradict each other, or the run does not fit.
        CheckpointError: the checkpoint to resume does not fit.
        MissingInputError: a file, a model or a run is missing.
    """

    def __init__(
        self,
        config: TrainConfig,
        origins: dict[str, str],
        phase1_config: TrainConfig,
        ranks: Ranks | None = None,
        stop: StopSignal | None = None,
    ) -> None:
        # Cheap checks come first. Nothing is loaded before all inputs are known to exist.
        self.ranks = ranks or Ranks()
        self.stop = stop
        if not self.ranks.is_single:
            self.ranks.require_same(run_fingerprint(config))
        self.explicit = explicit_keys(origins)
        config, phase1_config = with_absolute_paths(config), with_absolute_paths(phase1_config)
        # 1. Run folder. Rank 0 decides: the newest run may be meant. None is a new name.
        named = config.run.checkpoint_dir
        folder = resume_dir(config) if config.run.resume else named and Path(named)
        self._named: Path | None = self.ranks.all_gather_object(folder)[0]
        # 2. Resume: the run's configuration replaces this command's.
        begun = ContinuedRun(config, phase1_config, None, None)
        if config.run.resume:
            begun = continued_run(self._named, begun, self.explicit)
        elif self._named is not None:
            refuse_used_folder(self._named)
        if self._named is not None:
            refuse_blocked_files(self._named)
        config, self.phase1_config, self.resumed, self.phase1_resumed = begun
        self.found = checkpoint_names(self._named) if self._named is not None else []
        check_batch_size(config, config.run.phase, self.ranks)
        # 3. Device, 4. memory plan, 5. weights: the input that is most often missing.
        self.device = setup_process(config, self.ranks)
        generator = None
        if config.run.phase == 2:
            config = with_memory_plan(config, self.device, self.ranks.world_size)
            generator = self._check_generator(config)
            config = within_positions(config)
        self.config = config
        # 6. Data and encoder.
        self.inputs = RunInputs(config, self.ranks, generator)
        self.paths, self.encoder = self.inputs.paths, self.inputs.encoder

    def _check_generator(self, config: TrainConfig) -> Path | None:
        """The generator's folder, or None where its weights are random."""
        shards = num_shards(config, self.ranks)
        if config.run.generator_fsdp and shards == 1:
            logger.warning(
                "run.generator_fsdp=true: with one rank nothing is sharded, so this rank holds all "
                "weights. Start several with torchrun --nproc-per-node N."
            )
        name = config.generator_model
        folder = check_generator(config.generator, self.device, name=name, num_shards=shards)
        return None if is_random(name) else Path(folder)

    def _log_choices(self) -> None:
        config, device = self.config, str(self.device)
        if self.device.type != "cuda":
            device = f"cpu, {torch.get_num_threads()} threads"
        logger.info(
            "dragkit phase %d · device %s%s · preset %s · data %s%s · run folder %s",
            config.run.phase,
            device,
            "" if self.ranks.is_single else f" · {self.ranks.world_size} ranks",
            config.preset or "none",
            "demo (bundled)" if self.paths.bundled else self.paths.train,
            f" · generator {config.generator_model}" if config.run.phase == 2 else "",
            self.run_dir,
        )

    def execute(self) -> str:
        """Trains, evaluates and returns the closing summary.

        Raises:
            Interrupted: a signal stopped the run. `--resume` continues it.
        """
        ranks = self.ranks
        with StopSignal() if self.stop is None else nullcontext(self.stop) as stop:
            self.stop = stop
            # A rank that stopped alone would leave the others waiting in a collective.
            stop.raises = ranks.is_single
            folder = self._named
            if folder is None and ranks.is_main:
                folder = claim_run_dir(self.config)
            self.run_dir: Path = ranks.all_gather_object(folder)[0]
            self._log_choices()
            with RunLock(self.run_dir) if ranks.is_main else nullcontext():
                self._begin()
                try:
                    with stop.translated():
                        if self.config.run.phase == 1:
                            return self._phase1(self.config, self.run_dir, self.resumed)
                        return self._phase2()
                except Stopped as signal:
                    raise Interrupted(
                        f"stopped by {signal} between training steps. All that was trained is in "
                        f"{self.run_dir}. Continue with the same command and --resume "
                        f"{shlex.quote(str(self.run_dir))}"
                    ) from signal

    def _begin(self) -> None:
        """Checks the folder, which is locked now, and writes the settings into it."""
        folder = str(self.run_dir.absolute())
        self.config = with_values(self.config, {"run.checkpoint_dir": folder})
        first = {"run.checkpoint_dir": str(Path(folder, PHASE1)), "run.resume": False}
        self.phase1_config = with_values(self.phase1_config, first)
        if not self.ranks.is_main:
            return
        if not self.config.run.resume:
            refuse_used_folder(self.run_dir)
        elif checkpoint_names(self.run_dir) != self.found:
            raise RunInUseError(
                f"{self.run_dir}: another process has saved or removed checkpoints since this "
                "command began. Start it again."
            )
        write_settings(self.run_dir, self.config)
        if self._trains_phase1:
            write_settings(self.run_dir / PHASE1, self.phase1_config)

    @property
    def _trains_phase1(self) -> bool:
        run = self.config.run
        return run.phase == 2 and self.resumed is None and run.phase1_checkpoint is None

    def _fit(self, trainer: Trainer, results: ResultsTable, stage: str) -> Path:
        """Trains, evaluates the best checkpoint, and returns its folder."""
        trainer.fit()
        best = resolve_checkpoint(trainer.run_dir, "best")
        trainer.phase.load(load_checkpoint(best))
        results.evaluate(stage, trainer.phase)
        results.require_written()
        return best

    def _phase1(self, config: TrainConfig, run_dir: Path, resumed: LoadedCheckpoint | None) -> str:
        device, ranks = self.device, self.ranks
        check_batch_size(config, 1, ranks)
        # Phase 2 may train phase 1 first. Then phase 2 reports the test metrics of both.
        only_phase = config.run.phase == self.config.run.phase
        retriever = build_retriever(config, self.encoder).to(device)
        train, val, test = self.inputs.datasets(
            None, config.optim.batch_size_in(1), _PHASE1_EVALUATION_BATCH, test=only_phase
        )
        phase = build_retriever_phase(config, retriever, device, train, ranks)
        results = ResultsTable(run_dir, test, device, ranks, keep=resumed is not None)
        trainer = Trainer(
            config,
            phase,
            train,
            val,
            run_dir,
            device,
            command_dir=self.run_dir,
            ranks=ranks,
            stop=self.stop,
            inputs=self.inputs.fingerprints,
        )
        if resumed is not None:
            trainer.resume(resumed)
        elif only_phase and config.run.test_before_training:
            results.evaluate("untrained", phase)
        best = self._fit(trainer, results, "after phase 1")
        paths = self.paths
        data = "" if paths.bundled else f" --heuristics_path {shlex.quote(paths.train)}"
        return (
            f"{results.format()}\ncheckpoint: {best}\n"
            "next: python -m dragkit.train --phase 2 --phase1_checkpoint "
            f"{shlex.quote(str(run_dir))}{data}"
        )

    def _retriever_checkpoint(self) -> LoadedCheckpoint:
        """The checkpoint that phase 2 starts from: the one named, or that of a phase 1 run here."""
        named = self.config.run.phase1_checkpoint
        if named is None:
            folder = self.run_dir / PHASE1
            logger.info("no phase 1 checkpoint was named, so phase 1 trains first, in %s", folder)
            self._phase1(self.phase1_config, folder, self.phase1_resumed)
            named = str(folder)
        return load_checkpoint(resolve_checkpoint(Path(named), "best"))

    def _phase2(self) -> str:
        start = None
        if self._trains_phase1:
            first = self.phase1_config
        elif self.resumed is None:
            start = self._retriever_checkpoint()
            first = saved_config(start)
        if self.resumed is None:
            sections = ("retriever", "encoder")
            self.config = adopt_saved(self.config, first, self.explicit, sections)
        config = self.config
        # All that the run reads is loaded and checked before phase 1 trains.
        phase = build_joint(config, self.encoder, self.device, self.ranks)
        generator = phase.model.generator
        size = evaluation_batch_size(config, generator, self.device, self.ranks.world_size)
        # Cards may differ. Every rank takes the smallest size, so that all have the same batches.
        size = -self.ranks.all_reduce_max(-size)
        train, val, test = self.inputs.datasets(generator, config.optim.batch_size_in(2), size)
        if is_random(config.generator_model):
            logger.warning(
                "random weights answer nothing, so there is no validation and no results.json"
            )
            val = test = None
        if self._trains_phase1:
            start = self._retriever_checkpoint()
        results = ResultsTable(
            self.run_dir, test, self.device, self.ranks, keep=self.resumed is not None
        )
        trainer = Trainer(
            config,
            phase,
            train,
            val,
            self.run_dir,
            self.device,
            ranks=self.ranks,
            stop=self.stop,
            inputs=self.inputs.fingerprints,
        )
        if self.resumed is not None:
            trainer.resume(self.resumed)
        else:
            cascade = CascadeBaseline(config, phase.model, ranks=self.ranks, forward=phase.forward)
            if config.run.test_before_training:
                results.evaluate("untrained", cascade)
            phase.load_retriever(start)
            if config.run.test_before_training:
                results.evaluate("after phase 1 (cascade)", cascade)
        best = self._fit(trainer, results, "after phase 2 (joint)")
        if is_random(config.generator_model):
            return (
                f"{self.run_dir / 'metrics.jsonl'}: loss and throughput of a generator with random "
                f"weights\ncheckpoint: {best}"
            )
        return (
            f"{results.format()}\ncheckpoint: {best}\nnext:\n"
            "  evaluate on other questions: python -m dragkit.evaluate "
            f"{shlex.quote(str(self.run_dir))} --data FILE"
            + (_AFTER_DEMO if self.paths.bundled else "")
        )
