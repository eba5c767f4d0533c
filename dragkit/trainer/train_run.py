"""Trains a run from Python, as `python -m dragkit.train` does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dragkit.config import TrainConfig, differing_settings, resolve_config
from dragkit.distributed.torchrun import init_ranks
from dragkit.trainer.resume import resolve_checkpoint
from dragkit.trainer.run import TrainingRun


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A trained run.

    Attributes:
        run_dir: folder of the run.
        checkpoint: folder of the best checkpoint.
        metrics: mean of each test metric by stage, such as "untrained" and "after phase 1". It is
            empty without test questions.
    """

    run_dir: Path
    checkpoint: Path
    metrics: dict[str, dict[str, float]]


def train_run(config: TrainConfig, phase1_config: TrainConfig | None = None) -> TrainResult:
    """Trains the phase of a configuration and evaluates it on the test questions.

    A run of phase 2 without `run.phase1_checkpoint` trains phase 1 first.

    Args:
        config: configuration from `load_config`.
        phase1_config: configuration of that phase 1. None takes the preset's phase 1, with every
            setting in which `config` differs from the preset's phase 2. Blocks `phase1` of a file
            are in `load_config(..., overrides={"run.phase": 1})` only.

    Raises:
        CheckpointError: a checkpoint is damaged, or contradicts a setting of `config`.
        ConfigError: a setting does not fit the machine, the data or the run folder.
        DataError: a question file holds unusable rows.
        Interrupted: a signal stopped the run after it saved its state.
        MissingInputError: a file, a folder or the generator's weights are missing.
        WriteError: a checkpoint cannot be written.
    """
    # A configuration does not record which values were given. Those that differ from the preset
    # were, so phase 1 takes them over and a checkpoint may not contradict them.
    base = resolve_config(config.preset, overrides={"run.phase": config.run.phase})[0]
    changed = differing_settings(config, base)
    if phase1_config is None:
        overrides = changed | {"run.phase": 1}
        phase1_config = resolve_config(config.preset, overrides=overrides)[0]
    origins = dict.fromkeys(changed, "argument")
    with init_ranks(config.run) as ranks:
        run = TrainingRun(config, origins, phase1_config, ranks)
        run.execute()
    results = run.run_dir / "results.json"
    stages = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    return TrainResult(
        run_dir=run.run_dir,
        checkpoint=resolve_checkpoint(run.run_dir, "best"),
        metrics={
            stage: {name: score["mean"] for name, score in row["metrics"].items()}
            for stage, row in stages.items()
        },
    )
