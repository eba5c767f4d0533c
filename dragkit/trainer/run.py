"""A training run from configuration to result: data, models, phases, evaluation."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from dragkit.config import TrainConfig
from dragkit.data.cache import cache_root
from dragkit.errors import CheckpointError, ConfigError, MissingInputError
from dragkit.eval.evaluate import evaluate
from dragkit.model.encoder import TextEncoder, find_encoder
from dragkit.model.generator import Generator, check_generator, load_generator
from dragkit.model.joint import JointModel
from dragkit.model.retriever import Retriever
from dragkit.trainer.atomic import make_folders, replace_text
from dragkit.trainer.checkpoint import LoadedCheckpoint, RunLock, find_checkpoint, load_checkpoint
from dragkit.trainer.compile import compile_retriever
from dragkit.trainer.loop import Trainer
from dragkit.trainer.manifest import step_of_folder
from dragkit.trainer.phase import Phase
from dragkit.trainer.phase1 import RetrieverPhase
from dragkit.trainer.phase2 import JointPhase
from dragkit.trainer.source import QuestionSource

logger = logging.getLogger(__name__)

HEADLINE = ("strict-hits@1", "strict-f1", "rog-hit", "retrieval-recall", "answer-recall@10")


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


def setup(config: TrainConfig) -> torch.device:
    """Process-wide settings of a run; returns its device."""
    if config.run.num_threads is not None:
        torch.set_num_threads(config.run.num_threads)
    # State-space decays underflow into denormals, which some processors handle very slowly.
    torch.set_flush_denormal(True)
    device = select_device(config.run.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    return device


def new_run_dir(config: TrainConfig) -> Path:
    """The folder of this run: the one named, or a new one under runs/."""
    if config.run.checkpoint_dir is not None:
        return Path(config.run.checkpoint_dir)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = config.preset or Path(config.data.heuristics_path or "demo").name.split(".")[0]
    return Path("runs") / f"{stamp}-phase{config.run.phase}-{name}"


def run_of(folder: Path) -> Path:
    """The run that a folder belongs to: itself, or its parent where it is one checkpoint of it."""
    return folder.parent if step_of_folder(folder.name) is not None else folder


def refuse_used_folder(run_dir: Path) -> None:
    """A second run in one folder would mix its checkpoints with the first one's.

    Raises:
        ConfigError: the folder already holds checkpoints.
    """
    for folder in (run_dir, run_dir / "phase1"):
        if folder.is_dir() and any(step_of_folder(p.name) is not None for p in folder.iterdir()):
            raise ConfigError(
                f"run.checkpoint_dir: {run_dir} already holds a run. Continue it with --resume "
                f"{run_dir}, or name another folder."
            )


def resume_dir(config: TrainConfig) -> Path:
    """The run that `--resume` means.

    Raises:
        MissingInputError: there is none.
    """
    if isinstance(config.run.resume, str):
        return run_of(Path(config.run.resume))
    if config.run.checkpoint_dir is not None:
        return Path(config.run.checkpoint_dir)
    runs = sorted(p for p in Path("runs").glob(f"*-phase{config.run.phase}-*") if p.is_dir())
    if not runs:
        raise MissingInputError(
            "--resume: no run was named and there is none under runs/. Name one: --resume FOLDER."
        )
    return runs[-1]


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


class Stages:
    """The table of a run: test metrics after each stage, printed and kept in results.json."""

    def __init__(self, run_dir: Path, test: QuestionSource | None, device: torch.device) -> None:
        self.path = run_dir / "results.json"
        self.test, self.device = test, device
        self.rows: dict[str, dict] = {}
        if self.path.is_file():
            self.rows = json.loads(self.path.read_text(encoding="utf-8"))

    def measure(self, name: str, phase: Phase) -> None:
        """Evaluates on the test questions, where there are any."""
        if self.test is None:
            return
        logger.info("evaluating %s on %s", name, self.test.path.name)
        self.rows[name] = evaluate(phase, self.test, self.device).report.to_dict()
        make_folders(self.path.parent)
        replace_text(self.path, json.dumps(self.rows, indent=1) + "\n")

    def table(self) -> str:
        """Stages as rows, headline metrics in percent as columns."""
        if not self.rows:
            return ""
        asked = next(iter(self.rows.values()))["counts"]["asked"]
        title = f"test, {asked} questions"
        names = [n for n in HEADLINE if any(n in row["metrics"] for row in self.rows.values())]
        width = max(map(len, (title, *self.rows)))
        lines = [f"{title:<{width}}  " + "  ".join(names)]
        for stage, row in self.rows.items():
            cells = [
                f"{100 * row['metrics'][n]['mean']:.1f}" if n in row["metrics"] else "-"
                for n in names
            ]
            padded = (cell.rjust(len(n)) for cell, n in zip(cells, names, strict=True))
            lines.append(f"{stage:<{width}}  " + "  ".join(padded))
        return "\n".join(lines)


def _load_for_resume(run_dir: Path, phase_name: str) -> LoadedCheckpoint:
    loaded = load_checkpoint(find_checkpoint(run_dir))
    if loaded.state.phase != phase_name:
        raise CheckpointError(
            f"{loaded.folder}: a checkpoint of {loaded.state.phase}, not of {phase_name}. "
            "Use it with --phase1_checkpoint to start phase 2, or resume with the other --phase."
        )
    return loaded


def adopt_saved(
    config: TrainConfig, saved: TrainConfig, explicit: set[str], sections: tuple[str, ...]
) -> TrainConfig:
    """The configuration with the given sections taken from a checkpoint.

    Args:
        config: of this command; saved: of the checkpoint.
        explicit: dotted keys that the user gave.
        sections: which must agree, such as "retriever".

    Raises:
        CheckpointError: an explicit value contradicts the checkpoint; all of them are listed.
    """
    clashes = []
    for section in sections:
        ours, theirs = getattr(config, section), getattr(saved, section)
        for key in type(ours).model_fields:
            a, b = getattr(ours, key), getattr(theirs, key)
            if a != b and f"{section}.{key}" in explicit:
                clashes.append(f"  {section}.{key}: {a} was given, the checkpoint has {b}")
    if clashes:
        raise CheckpointError(
            "the checkpoint was made with other settings:\n"
            + "\n".join(clashes)
            + "\nLeave these flags away, or train phase 1 again with them."
        )
    return config.model_copy(update={name: getattr(saved, name) for name in sections})


def resumed_config(
    config: TrainConfig, loaded: LoadedCheckpoint, explicit: set[str]
) -> TrainConfig:
    """The checkpoint's own settings, with this command's place, device and reporting."""
    saved = TrainConfig.model_validate(loaded.json["config"])
    if "run.seed" in explicit and config.run.seed != saved.run.seed:
        raise CheckpointError(
            f"--seed {config.run.seed}: the run in {loaded.folder.parent} has seed "
            f"{saved.run.seed}; leave the flag away to continue it."
        )
    sections = tuple(s for s in TrainConfig.model_fields if s not in ("run", "preset"))
    kept = {name: getattr(saved.run, name) for name in ("seed", "precision", "compile")}
    config = config.model_copy(update={"run": config.run.model_copy(update=kept)})
    return adopt_saved(config, saved, explicit, sections)


def explicit_keys(origins: dict[str, str]) -> set[str]:
    """Dotted keys whose value comes from the user rather than from a default or a preset."""
    return {
        key
        for key, origin in origins.items()
        if origin not in ("default", "no data named") and not origin.startswith("preset ")
    }


class Run:
    """One `python -m dragkit.train` command.

    Args:
        config: merged configuration; origins: where each value came from.
        phase1_config: the configuration that phase 1 would have, for a phase 2 without checkpoint.
    """

    def __init__(
        self, config: TrainConfig, origins: dict[str, str], phase1_config: TrainConfig
    ) -> None:
        self.phase1_config = phase1_config
        self.explicit = explicit_keys(origins)
        self.resumed: LoadedCheckpoint | None = None
        self.run_dir = new_run_dir(config)
        if config.run.resume:
            self.run_dir = resume_dir(config)
            config = self._resumed_config(config)
        else:
            refuse_used_folder(self.run_dir)
        self.config = config
        self.device = setup(config)
        if config.run.phase == 2:
            # Before anything costs time: the largest input is the one most likely to be missing.
            check_generator(config.generator, self.device, name=config.generator_model)
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
        self.resumed = _load_for_resume(self.run_dir, name)
        return resumed_config(config, self.resumed, self.explicit)

    def source(
        self, path: str | None, generator: Generator | None, batch: int
    ) -> QuestionSource | None:
        """One of the run's files, packed."""
        if path is None:
            return None
        return QuestionSource(path, self.config, self.encoder, generator, batch)

    def announce(self) -> None:
        """One line that says what was chosen."""
        config = self.config
        generator = f" · generator {config.generator_model}" if config.run.phase == 2 else ""
        logger.info(
            "dragkit phase %d · device %s · preset %s · data %s%s · run folder %s",
            config.run.phase,
            self.device
            if self.device.type == "cuda"
            else f"cpu, {torch.get_num_threads()} threads",
            config.preset or "none",
            "demo (bundled)" if self.paths.bundled else self.paths.train,
            generator,
            self.run_dir,
        )

    def execute(self) -> str:
        """Runs the command; returns the closing summary."""
        self.announce()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with RunLock(self.run_dir):
            if self.config.run.phase == 1:
                return self._phase1(self.config, self.run_dir, self.resumed)
            return self._phase2()

    def _phase1(self, config: TrainConfig, run_dir: Path, resumed: LoadedCheckpoint | None) -> str:
        retriever = build_retriever(config, self.encoder).to(self.device)
        phase = maybe_compile(RetrieverPhase(config, retriever), retriever, config, self.device)
        batch = config.optim.batch_size_in(1)
        train = self.source(self.paths.train, None, batch)
        val = self.source(self.paths.val, None, 64)
        only_phase = config.run.phase == self.config.run.phase
        stages = Stages(
            run_dir, self.source(self.paths.test, None, 64) if only_phase else None, self.device
        )
        trainer = Trainer(config, phase, train, val, run_dir, self.device, command_dir=self.run_dir)
        if resumed is not None:
            trainer.resume(resumed)
        elif only_phase:
            stages.measure("untrained", phase)
        trainer.fit()
        best = find_checkpoint(run_dir, which="best" if val is not None else "latest")
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
                    resumed = _load_for_resume(folder, "phase1")
                    config = resumed_config(config, resumed, set())
                except MissingInputError:
                    resumed = None  # stopped before its first checkpoint
            logger.info("no phase 1 checkpoint was named; training it first in %s", folder)
            self._phase1(config, folder, resumed)
            named = str(folder)
        which = "best" if (Path(named) / "best").exists() else "latest"
        return load_checkpoint(find_checkpoint(Path(named), which=which))

    def _phase2(self) -> str:
        if self.resumed is None:
            start = self._retriever_checkpoint()
            saved = TrainConfig.model_validate(start.json["config"])
            self.config = adopt_saved(self.config, saved, self.explicit, ("retriever", "encoder"))
        config = self.config
        phase = build_joint(config, self.encoder, self.device)
        generator = phase.model.generator
        train = self.source(self.paths.train, generator, config.optim.batch_size_in(2))
        val = self.source(self.paths.val, generator, 32)
        stages = Stages(self.run_dir, self.source(self.paths.test, generator, 32), self.device)
        trainer = Trainer(config, phase, train, val, self.run_dir, self.device)
        if self.resumed is not None:
            trainer.resume(self.resumed)
        else:
            phase.cascade = True
            stages.measure("untrained", phase)
            phase.load_retriever(start)
            stages.measure("after phase 1 (cascade)", phase)
            phase.cascade = False
        trainer.fit()
        best = find_checkpoint(self.run_dir, which="best" if val is not None else "latest")
        phase.load(load_checkpoint(best))
        stages.measure("after phase 2 (joint)", phase)
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
