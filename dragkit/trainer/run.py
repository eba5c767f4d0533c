"""A training run from configuration to result: data, models, phases, evaluation."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path

import torch

from dragkit.checkpoint.checkpoint import (
    LoadedCheckpoint,
    RunLock,
    find_checkpoint,
    load_checkpoint,
)
from dragkit.config import TrainConfig, read_saved_config
from dragkit.data.cache import cache_root
from dragkit.data.lines import open_source
from dragkit.distributed.rank_consistency import check_batch_size, run_fingerprint
from dragkit.distributed.ranks import Ranks
from dragkit.errors import MissingInputError
from dragkit.generator.generator import Generator
from dragkit.generator.load import check_generator, within_positions
from dragkit.generator.random_weights import is_random
from dragkit.retriever.text_encoder import TextEncoder, find_encoder
from dragkit.trainer.build import (
    DataPaths,
    build_joint,
    build_retriever,
    build_retriever_phase,
    data_paths,
    num_shards,
    setup_process,
    with_memory_plan,
)
from dragkit.trainer.loop import Trainer
from dragkit.trainer.phase2 import CascadeBaseline
from dragkit.trainer.question_dataset import QuestionDataset, evaluation_batch_size
from dragkit.trainer.results_table import ResultsTable
from dragkit.trainer.resume import (
    adopt_saved,
    explicit_keys,
    load_for_resume,
    new_run_dir,
    refuse_used_folder,
    resolve_checkpoint,
    resume_dir,
    resumed_config,
)

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
    ) -> None:
        # Cheap checks come first. Nothing is loaded before all inputs are known to exist.
        self.ranks = ranks or Ranks()
        if not self.ranks.is_single:
            self.ranks.require_same(run_fingerprint(config))
        self.phase1_config = phase1_config
        self.explicit = explicit_keys(origins)
        # 1. Run folder. Rank 0 decides: the name may hold the time, or mean the newest run.
        folder = resume_dir(config) if config.run.resume else new_run_dir(config)
        self.run_dir: Path = self.ranks.all_gather_object(folder)[0]
        # 2. Resume: the checkpoint's configuration replaces this command's.
        self.resumed: LoadedCheckpoint | None = None
        if config.run.resume:
            self.resumed = self._checkpoint_to_resume(config)
            if self.resumed is not None:
                config = resumed_config(config, self.resumed, self.explicit)
        else:
            refuse_used_folder(self.run_dir)
        check_batch_size(config, config.run.phase, self.ranks)
        # 3. Device, 4. memory plan, 5. weights: the input that is most often missing.
        self.device = setup_process(config, self.ranks)
        if config.run.phase == 2:
            config = with_memory_plan(config, self.device, self.ranks.world_size)
            self._check_generator(config)
            config = within_positions(config)
        self.config = config
        # 6. Data and encoder.
        self.paths = self._find_data()
        self.encoder = TextEncoder(
            find_encoder(config.encoder.model), cache_root(config.data.cache_dir)
        )

    def _checkpoint_to_resume(self, config: TrainConfig) -> LoadedCheckpoint | None:
        """The run's newest checkpoint, or None if phase 1 was interrupted."""
        if config.run.phase == 2 and (self.run_dir / "phase1").is_dir():
            try:
                find_checkpoint(self.run_dir)
            except MissingInputError:
                return None
        return load_for_resume(self.run_dir, f"phase{config.run.phase}")

    def _check_generator(self, config: TrainConfig) -> None:
        shards = num_shards(config, self.ranks)
        if config.run.generator_fsdp and shards == 1:
            logger.warning(
                "run.generator_fsdp=true: with one rank nothing is sharded, so this rank holds all "
                "weights. Start several with torchrun --nproc-per-node N."
            )
        name = config.generator_model
        check_generator(config.generator, self.device, name=name, num_shards=shards)

    def _find_data(self) -> DataPaths:
        with self.ranks.main_process_first():
            paths = data_paths(self.config)
        for path in (paths.train, paths.val, paths.test):
            if path is not None:
                open_source(Path(path)).close()
        return paths

    def dataset(
        self,
        path: str | None,
        generator: Generator | None,
        batch_size: int,
        *,
        training: bool = False,
    ) -> QuestionDataset | None:
        """Packs one of the run's files, or returns None without a path."""
        if path is None:
            return None
        with self.ranks.main_process_first():
            dataset = QuestionDataset(
                path, self.config, self.encoder, generator, batch_size, training=training
            )
        self.ranks.require_same({"the content of the questions": dataset.store.fingerprint})
        return dataset

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
        """Trains, evaluates and returns the closing summary."""
        self._log_choices()
        if self.ranks.is_main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        with RunLock(self.run_dir) if self.ranks.is_main else nullcontext():
            if self.config.run.phase == 1:
                return self._phase1(self.config, self.run_dir, self.resumed)
            return self._phase2()

    def _fit(self, trainer: Trainer, results: ResultsTable, stage: str) -> Path:
        """Trains, evaluates the best checkpoint, and returns its folder."""
        trainer.fit()
        best = resolve_checkpoint(trainer.run_dir, "best")
        trainer.phase.load(load_checkpoint(best))
        results.evaluate(stage, trainer.phase)
        return best

    def _phase1(self, config: TrainConfig, run_dir: Path, resumed: LoadedCheckpoint | None) -> str:
        device, ranks, size = self.device, self.ranks, _PHASE1_EVALUATION_BATCH
        check_batch_size(config, 1, ranks)
        # Phase 2 may train phase 1 first. Then phase 2 reports the test metrics of both.
        only_phase = config.run.phase == self.config.run.phase
        retriever = build_retriever(config, self.encoder).to(device)
        train = self.dataset(self.paths.train, None, config.optim.batch_size_in(1), training=True)
        val = self.dataset(self.paths.val, None, size)
        test = self.dataset(self.paths.test, None, size) if only_phase else None
        phase = build_retriever_phase(config, retriever, device, train, ranks)
        results = ResultsTable(run_dir, test, device, ranks)
        trainer = Trainer(
            config, phase, train, val, run_dir, device, command_dir=self.run_dir, ranks=ranks
        )
        if resumed is not None:
            trainer.resume(resumed)
        elif only_phase and config.run.test_before_training:
            results.evaluate("untrained", phase)
        best = self._fit(trainer, results, "after phase 1")
        data = "" if self.paths.bundled else f" --heuristics_path {self.paths.train}"
        return (
            f"{results.format()}\ncheckpoint: {best}\n"
            f"next: python -m dragkit.train --phase 2 --phase1_checkpoint {run_dir}{data}"
        )

    def _retriever_checkpoint(self) -> LoadedCheckpoint:
        """The checkpoint that phase 2 starts from: the one named, or that of a phase 1 run here."""
        named = self.config.run.phase1_checkpoint
        if named is None:
            folder = self.run_dir / "phase1"
            config, resumed = self.phase1_config, None
            if self.config.run.resume and folder.is_dir():
                try:
                    resumed = load_for_resume(folder, "phase1")
                    config = resumed_config(config, resumed, set())
                except MissingInputError:
                    # Phase 1 was interrupted before its first checkpoint.
                    resumed = None
            logger.info("no phase 1 checkpoint was named, so phase 1 trains first, in %s", folder)
            self._phase1(config, folder, resumed)
            named = str(folder)
        return load_checkpoint(resolve_checkpoint(Path(named), "best"))

    def _phase2(self) -> str:
        if self.resumed is None:
            start = self._retriever_checkpoint()
            saved = read_saved_config(start.json["config"], str(start.folder))
            self.config = adopt_saved(self.config, saved, self.explicit, ("retriever", "encoder"))
        config = self.config
        phase = build_joint(config, self.encoder, self.device, self.ranks)
        generator = phase.model.generator
        train = self.dataset(
            self.paths.train, generator, config.optim.batch_size_in(2), training=True
        )
        size = evaluation_batch_size(config, generator, self.device, self.ranks.world_size)
        # Cards may differ. Every rank takes the smallest size, so that all have the same batches.
        size = -self.ranks.all_reduce_max(-size)
        val_path, test_path = self.paths.val, self.paths.test
        if is_random(config.generator_model):
            logger.warning(
                "random weights answer nothing, so there is no validation and no results.json"
            )
            val_path = test_path = None
        val = self.dataset(val_path, generator, size)
        test = self.dataset(test_path, generator, size)
        results = ResultsTable(self.run_dir, test, self.device, self.ranks)
        trainer = Trainer(config, phase, train, val, self.run_dir, self.device, ranks=self.ranks)
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
            f"  evaluate on other questions: python -m dragkit.evaluate {self.run_dir} --data FILE"
            + (_AFTER_DEMO if self.paths.bundled else "")
        )
