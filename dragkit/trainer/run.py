"""A training run from configuration to result: data, models, phases, evaluation."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from dragkit.config import TrainConfig
from dragkit.data.cache import cache_root
from dragkit.data.capacity import Buckets
from dragkit.errors import ConfigError, MissingInputError
from dragkit.model.budget import planned, this_device
from dragkit.model.encoder import TextEncoder, find_encoder
from dragkit.model.generator import Generator
from dragkit.model.joint import JointModel
from dragkit.model.load import check_generator, generator_shape, load_generator
from dragkit.model.random_weights import is_random
from dragkit.model.retriever import Retriever
from dragkit.trainer.agreement import check_batch, start_facts
from dragkit.trainer.checkpoint import LoadedCheckpoint, RunLock, find_checkpoint, load_checkpoint
from dragkit.trainer.compile import compile_retriever
from dragkit.trainer.loop import Trainer
from dragkit.trainer.phase import Phase
from dragkit.trainer.phase1 import RetrieverPhase
from dragkit.trainer.phase2 import JointPhase
from dragkit.trainer.ranks import Ranks
from dragkit.trainer.replay import StepReplay, capture_for
from dragkit.trainer.resume import (
    adopt_saved,
    chosen_checkpoint,
    explicit_keys,
    load_for_resume,
    new_run_dir,
    refuse_used_folder,
    resume_dir,
    resumed_config,
)
from dragkit.trainer.source import QuestionSource, evaluation_batch
from dragkit.trainer.stages import Stages

logger = logging.getLogger(__name__)

_BUCKET_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class DataPaths:
    """The three files of a run; only `train` must exist."""

    train: str
    val: str | None
    test: str | None
    bundled: bool


def select_device(name: str) -> torch.device:
    """The device of a run; "auto" takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"run.device: {name} was asked for, but no CUDA device is available here."
        )
    return device


def data_paths(config: TrainConfig) -> DataPaths:
    """The files named in the configuration, or the bundled demo set, built on first use."""
    data = config.data
    if data.heuristics_path is not None:
        return DataPaths(
            data.heuristics_path, data.val_heuristics_path, data.test_heuristics_path, False
        )
    from dragkit.demo import demo_files

    demo = demo_files(cache_root(data.cache_dir))
    return DataPaths(
        str(demo.train),
        data.val_heuristics_path or str(demo.dev),
        data.test_heuristics_path or str(demo.test),
        True,
    )


def setup(config: TrainConfig, ranks: Ranks | None = None) -> torch.device:
    """Process-wide settings of a run; returns its device, or that of this rank of it."""
    if config.run.num_threads is not None:
        torch.set_num_threads(config.run.num_threads)
    # State-space decays underflow into denormals, which some processors handle very slowly.
    torch.set_flush_denormal(True)
    device = (ranks or Ranks()).use(select_device(config.run.device))
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    return device


def fitted(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The configuration with what the plan chooses for a GPU; on a CPU nothing is chosen.

    Raises:
        ConfigError: the run does not fit; names settings with which it would.
    """
    if device.type != "cuda":
        return config
    shape = generator_shape(config.generator, name=config.generator_model)
    if shape is None:
        logger.info("no plan for %s: it is not a Nemotron-H", config.generator_model)
        return config
    config = planned(config, shape, this_device(device))
    chosen = config.generator
    logger.info(
        "plan: %d tokens in a generator pass, checkpointing %s (python -m dragkit.plan)",
        chosen.tokens_per_pass,
        chosen.checkpointing,
    )
    return config


def build_retriever(config: TrainConfig, encoder: TextEncoder) -> Retriever:
    """A fresh retriever; its weights are a function of the seed."""
    torch.manual_seed(config.run.seed)
    return Retriever(config.retriever, encoder.dim)


def build_joint(config: TrainConfig, encoder: TextEncoder, device: torch.device) -> JointPhase:
    """Phase 2's model with a fresh retriever and projector around the loaded generator."""
    retriever = build_retriever(config, encoder)
    torch.manual_seed(config.run.seed + 1)
    generator = load_generator(config.generator, device, name=config.generator_model)
    model = JointModel(config, retriever, generator).to(device)
    return maybe_compile(JointPhase(config, model), model.retriever, config, device)


def maybe_compile(
    phase: Phase, retriever: Retriever, config: TrainConfig, device: torch.device
) -> Phase:
    """Compiles the retriever's forward where the configuration or the device asks for it."""
    wanted = device.type == "cuda" if config.run.compile is None else config.run.compile
    if wanted:
        phase.forward = compile_retriever(retriever)  # type: ignore[attr-defined]
    return phase


def maybe_replay(
    phase: RetrieverPhase,
    train: QuestionSource,
    config: TrainConfig,
    device: torch.device,
    ranks: Ranks | None = None,
) -> None:
    """Lets phase 1 replay its step, where the device can and the configuration does not object.

    The usual size of a batch is that of the first ones of epoch 0, also in a resumed run.
    """
    capture = capture_for(device) if config.run.cuda_graphs else None
    if capture is None or train.store.num_relations == 0:
        return
    batches = train.sampler.batches(0)[:_BUCKET_SAMPLES]
    slices = (ranks or Ranks()).share(batches)
    samples = [own or whole for own, whole in zip(slices, batches, strict=True)]
    phase.replay = StepReplay(
        phase.loss,
        list(phase.model.parameters()),
        Buckets([train.collator(rows) for rows in samples]),
        capture,
        max_graphs=config.run.max_cuda_graphs,
    )
    train.pin = False  # the replay makes page-locked copies of its own


class Run:
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
        if not self.ranks.alone:
            self.ranks.require_same(start_facts(config))
        self.phase1_config = phase1_config
        self.explicit = explicit_keys(origins)
        self.resumed: LoadedCheckpoint | None = None
        folder = resume_dir(config) if config.run.resume else new_run_dir(config)
        # Of the first rank: the name may hold the time, or be the newest there is.
        self.run_dir = Path(str(self.ranks.gather(str(folder))[0]))
        if config.run.resume:
            config = self._resumed_config(config)
        else:
            refuse_used_folder(self.run_dir)
        check_batch(config, config.run.phase, self.ranks)
        self.config = config
        self.device = setup(config, self.ranks)
        if config.run.phase == 2:
            # Before anything costs time: the largest input is the one most likely to be missing.
            self.config = config = fitted(config, self.device)
            check_generator(config.generator, self.device, name=config.generator_model)
        with self.ranks.in_turn():
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
    ) -> QuestionSource | None:
        """One of the run's files, packed."""
        if path is None:
            return None
        with self.ranks.in_turn():
            source = QuestionSource(path, self.config, self.encoder, generator, batch)
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
            "" if self.ranks.alone else f" · {self.ranks.count} ranks",
            config.preset or "none",
            "demo (bundled)" if self.paths.bundled else self.paths.train,
            generator,
            self.run_dir,
        )

    def execute(self) -> str:
        """Runs the command; returns the closing summary."""
        self.announce()
        if self.ranks.first:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        with RunLock(self.run_dir) if self.ranks.first else nullcontext():
            if self.config.run.phase == 1:
                return self._phase1(self.config, self.run_dir, self.resumed)
            return self._phase2()

    def _phase1(self, config: TrainConfig, run_dir: Path, resumed: LoadedCheckpoint | None) -> str:
        check_batch(config, 1, self.ranks)
        retriever = build_retriever(config, self.encoder).to(self.device)
        phase = maybe_compile(RetrieverPhase(config, retriever), retriever, config, self.device)
        batch = config.optim.batch_size_in(1)
        train = self.source(self.paths.train, None, batch)
        val = self.source(self.paths.val, None, 64)
        only_phase = config.run.phase == self.config.run.phase
        test = self.source(self.paths.test, None, 64) if only_phase else None
        stages = Stages(run_dir, test, self.device, self.ranks)
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
        best = chosen_checkpoint(run_dir, "best")
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
        return load_checkpoint(chosen_checkpoint(Path(named), "best"))

    def _phase2(self) -> str:
        if self.resumed is None:
            start = self._retriever_checkpoint()
            saved = TrainConfig.model_validate(start.json["config"])
            self.config = adopt_saved(self.config, saved, self.explicit, ("retriever", "encoder"))
        config = self.config
        phase = build_joint(config, self.encoder, self.device)
        phase.ranks = self.ranks
        generator = phase.model.generator
        train = self.source(self.paths.train, generator, config.optim.batch_size_in(2))
        size = evaluation_batch(self.device)
        val_path, test_path = self.paths.val, self.paths.test
        if is_random(config.generator_model):
            logger.warning("random weights answer nothing: no validation, no test, no results.json")
            val_path = test_path = None
        val = self.source(val_path, generator, size)
        test = self.source(test_path, generator, size)
        stages = Stages(self.run_dir, test, self.device, self.ranks)
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
        best = chosen_checkpoint(self.run_dir, "best")
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
