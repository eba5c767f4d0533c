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
from dragkit.distributed.rank_consistency import check_batch_size, run_fingerprint
from dragkit.distributed.ranks import Ranks
from dragkit.errors import MissingInputError
from dragkit.generator.generator import Generator
from dragkit.generator.load import check_generator
from dragkit.generator.random_weights import is_random
from dragkit.retriever.text_encoder import TextEncoder, find_encoder
from dragkit.trainer.build import (
    build_joint,
    build_retriever,
    data_paths,
    maybe_compile,
    maybe_replay,
    setup_process,
    shards,
    with_memory_plan,
)
from dragkit.trainer.loop import Trainer
from dragkit.trainer.phase1 import RetrieverPhase
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


class TrainingRun:
    """One `python -m dragkit.train` command.

    Args:
        config: merged configuration; origins: where each value came from.
        phase1_config: the configuration that phase 1 would have, for a phase 2 without checkpoint.
        ranks: those that run it together; None means this process alone.
    """

    def __init__(
        self,
        config: TrainConfig,
        origins: dict[str, str],
        phase1_config: TrainConfig,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        if not self.ranks.is_single:
            self.ranks.require_same(run_fingerprint(config))
        self.phase1_config = phase1_config
        self.explicit = explicit_keys(origins)
        self.resumed: LoadedCheckpoint | None = None
        folder = resume_dir(config) if config.run.resume else new_run_dir(config)
        # Of the first rank: the name may hold the time, or be the newest there is.
        self.run_dir = self.ranks.all_gather_object(folder)[0]
        if config.run.resume:
            config = self._resumed_config(config)
        else:
            refuse_used_folder(self.run_dir)
        check_batch_size(config, config.run.phase, self.ranks)
        self.config = config
        self.device = setup_process(config, self.ranks)
        if config.run.phase == 2:
            # Before anything costs time: the largest input is the one most likely to be missing.
            self.config = config = with_memory_plan(config, self.device, self.ranks.world_size)
            parts = shards(config, self.ranks)
            if config.run.generator_fsdp and parts == 1:
                logger.warning(
                    "run.generator_fsdp=true: one rank has nobody to share with, so it holds all "
                    "weights. "
                    "Start several with torchrun --nproc-per-node N.",
                )
            name = config.generator_model
            check_generator(config.generator, self.device, name=name, num_shards=parts)
        with self.ranks.main_process_first():
            self.paths = data_paths(config)
        for path in (self.paths.train, self.paths.val, self.paths.test):
            if path is not None and not Path(path).is_file():
                raise MissingInputError(f"{path}: no such file.")
        self.encoder = TextEncoder(
            find_encoder(config.encoder.model), cache_root(config.data.cache_dir)
        )

    def _resumed_config(self, config: TrainConfig) -> TrainConfig:
        name = f"phase{config.run.phase}"
        if config.run.phase == 2 and (self.run_dir / "phase1").is_dir():
            try:
                find_checkpoint(self.run_dir)
            except MissingInputError:
                return config  # interrupted while phase 1 was still training
        self.resumed = load_for_resume(self.run_dir, name)
        return resumed_config(config, self.resumed, self.explicit)

    def source(
        self, path: str | None, generator: Generator | None, batch: int
    ) -> QuestionDataset | None:
        """One of the run's files, packed."""
        if path is None:
            return None
        with self.ranks.main_process_first():
            source = QuestionDataset(path, self.config, self.encoder, generator, batch)
        self.ranks.require_same({"the content of the questions": source.store.fingerprint})
        return source

    def announce(self) -> None:
        """One line that says what was chosen."""
        config = self.config
        generator = f" · generator {config.generator_model}" if config.run.phase == 2 else ""
        logger.info(
            "dragkit phase %d · device %s%s · preset %s · data %s%s · run folder %s",
            config.run.phase,
            self.device
            if self.device.type == "cuda"
            else f"cpu, {torch.get_num_threads()} threads",
            "" if self.ranks.is_single else f" · {self.ranks.world_size} ranks",
            config.preset or "none",
            "demo (bundled)" if self.paths.bundled else self.paths.train,
            generator,
            self.run_dir,
        )

    def execute(self) -> str:
        """Runs the command; returns the closing summary."""
        self.announce()
        if self.ranks.is_main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        with RunLock(self.run_dir) if self.ranks.is_main else nullcontext():
            if self.config.run.phase == 1:
                return self._phase1(self.config, self.run_dir, self.resumed)
            return self._phase2()

    def _phase1(self, config: TrainConfig, run_dir: Path, resumed: LoadedCheckpoint | None) -> str:
        check_batch_size(config, 1, self.ranks)
        retriever = build_retriever(config, self.encoder).to(self.device)
        phase = maybe_compile(RetrieverPhase(config, retriever), retriever, config, self.device)
        batch = config.optim.batch_size_in(1)
        train = self.source(self.paths.train, None, batch)
        val = self.source(self.paths.val, None, 64)
        only_phase = config.run.phase == self.config.run.phase
        test = self.source(self.paths.test, None, 64) if only_phase else None
        stages = ResultsTable(run_dir, test, self.device, self.ranks)
        maybe_replay(phase, train, config, self.device, self.ranks)
        trainer = Trainer(
            config,
            phase,
            train,
            val,
            run_dir,
            self.device,
            command_dir=self.run_dir,
            ranks=self.ranks,
        )
        if resumed is not None:
            trainer.resume(resumed)
        elif only_phase:
            stages.measure("untrained", phase)
        trainer.fit()
        best = resolve_checkpoint(run_dir, "best")
        phase.load(load_checkpoint(best))
        stages.measure("after phase 1", phase)
        data = "" if self.paths.bundled else f" --heuristics_path {self.paths.train}"
        return "\n".join(
            [
                stages.table(),
                f"checkpoint: {best}",
                f"next: python -m dragkit.train --phase 2 --phase1_checkpoint {run_dir}{data}",
            ]
        )

    def _retriever_checkpoint(self) -> LoadedCheckpoint:
        """Where phase 2 starts: the checkpoint named, or a phase 1 trained here and now."""
        named = self.config.run.phase1_checkpoint
        if named is None:
            folder = self.run_dir / "phase1"
            config = self.phase1_config
            resumed = None
            if self.config.run.resume and folder.is_dir():
                try:
                    resumed = load_for_resume(folder, "phase1")
                    config = resumed_config(config, resumed, set())
                except MissingInputError:
                    resumed = None  # stopped before its first checkpoint
            logger.info("no phase 1 checkpoint was named; training it first in %s", folder)
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
        train = self.source(self.paths.train, generator, config.optim.batch_size_in(2))
        size = evaluation_batch_size(config, generator, self.device, self.ranks.world_size)
        size = -self.ranks.all_reduce_max(
            -size
        )  # the least: batches are dealt out, and cards may differ
        val_path, test_path = self.paths.val, self.paths.test
        if is_random(config.generator_model):
            logger.warning("random weights answer nothing: no validation, no test, no results.json")
            val_path = test_path = None
        val = self.source(val_path, generator, size)
        test = self.source(test_path, generator, size)
        stages = ResultsTable(self.run_dir, test, self.device, self.ranks)
        trainer = Trainer(config, phase, train, val, self.run_dir, self.device, ranks=self.ranks)
        if self.resumed is not None:
            trainer.resume(self.resumed)
        else:
            phase.cascade = True
            stages.measure("untrained", phase)
            phase.load_retriever(start)
            stages.measure("after phase 1 (cascade)", phase)
            phase.cascade = False
        trainer.fit()
        best = resolve_checkpoint(self.run_dir, "best")
        phase.load(load_checkpoint(best))
        stages.measure("after phase 2 (joint)", phase)
        if is_random(config.generator_model):
            return (
                f"{self.run_dir / 'metrics.jsonl'}: loss and throughput of a generator with random "
                f"weights\ncheckpoint: {best}"
            )
        lines = [stages.table(), f"checkpoint: {best}", "next:"]
        lines.append(
            f"  evaluate on other questions: python -m dragkit.evaluate {self.run_dir} --data FILE"
        )
        if self.paths.bundled:
            lines.append(
                "  your own questions: python -m dragkit.train --phase 2 --preset tiny "
                "--generator_model tiny --heuristics_path FILE.jsonl"
            )
            lines.append(
                "  the 30B (one H200 or B200; hf download unsloth/Nemotron-3-Nano-30B-A3B): "
                "python -m dragkit.train --phase 2 --preset h200 --heuristics_path FILE.jsonl"
            )
        return "\n".join(lines)
