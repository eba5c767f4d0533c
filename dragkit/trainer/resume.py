"""Finds the folder of a run, and merges a resumed run's settings with its checkpoint."""

from __future__ import annotations

import time
from pathlib import Path

from dragkit.checkpoint.checkpoint import LoadedCheckpoint, find_checkpoint, load_checkpoint
from dragkit.checkpoint.manifest import step_of_folder
from dragkit.config import TrainConfig, read_saved_config
from dragkit.errors import CheckpointError, ConfigError, MissingInputError


def new_run_dir(config: TrainConfig) -> Path:
    """The folder of a new run: `run.checkpoint_dir`, or one under runs/ named after the time."""
    if config.run.checkpoint_dir is not None:
        return Path(config.run.checkpoint_dir)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = config.preset or Path(config.data.heuristics_path or "demo").name.split(".")[0]
    return Path("runs") / f"{stamp}-phase{config.run.phase}-{name}"


def run_dir_of(folder: Path) -> Path:
    """The run folder of a run folder or of one of its checkpoints."""
    return folder.parent if step_of_folder(folder.name) is not None else folder


def refuse_used_folder(run_dir: Path) -> None:
    """Raises a ConfigError where a new run would mix its checkpoints with an earlier one's."""
    if _holds_checkpoint(run_dir):
        raise ConfigError(
            f"run.checkpoint_dir: {run_dir} already holds a run. Continue it with --resume "
            f"{run_dir}, or name another folder."
        )


def _holds_checkpoint(run_dir: Path) -> bool:
    """Whether a run folder has a checkpoint, possibly of the phase 1 that phase 2 trains first."""
    return any(
        step_of_folder(path.name) is not None
        for folder in (run_dir, run_dir / "phase1")
        if folder.is_dir()
        for path in folder.iterdir()
    )


def resume_dir(config: TrainConfig) -> Path:
    """The run folder that `--resume` means.

    Without a name it is the newest run of this phase that `new_run_dir` named.

    Raises:
        MissingInputError: there is no such run.
    """
    if isinstance(config.run.resume, str):
        return run_dir_of(Path(config.run.resume))
    if config.run.checkpoint_dir is not None:
        return Path(config.run.checkpoint_dir)
    # A run that failed before its first checkpoint also has a folder.
    runs = [p for p in Path("runs").glob(f"*-phase{config.run.phase}-*") if _holds_checkpoint(p)]
    if not runs:
        raise MissingInputError(
            "--resume: no run was named, and runs/ has no "
            f"<time>-phase{config.run.phase}-<name> with a checkpoint. Name one: --resume FOLDER."
        )
    return max(runs)


def load_for_resume(run_dir: Path, phase_name: str) -> LoadedCheckpoint:
    """Loads the newest checkpoint of a run.

    Raises:
        CheckpointError: the checkpoint is of the other phase.
    """
    loaded = load_checkpoint(find_checkpoint(run_dir))
    if loaded.state.phase != phase_name:
        raise CheckpointError(
            f"{loaded.folder}: this is a checkpoint of {loaded.state.phase}, not of {phase_name}. "
            "Start phase 2 from it with --phase1_checkpoint, or resume with the other --phase."
        )
    return loaded


def adopt_saved(
    config: TrainConfig, saved: TrainConfig, explicit: set[str], sections: tuple[str, ...]
) -> TrainConfig:
    """The configuration with whole sections replaced by those of a checkpoint.

    Raises:
        CheckpointError: explicit values contradict the checkpoint. The message lists all of them.
    """
    clashes = []
    for section in sections:
        given, kept = getattr(config, section), getattr(saved, section)
        for key in type(given).model_fields:
            a, b = getattr(given, key), getattr(kept, key)
            if a != b and f"{section}.{key}" in explicit:
                clashes.append(f"  {section}.{key}: {a} was given, the checkpoint has {b}")
    if clashes:
        raise CheckpointError(
            "these settings differ from the checkpoint's:\n"
            + "\n".join(clashes)
            + "\nOmit them, or train phase 1 again with them."
        )
    return config.model_copy(update={name: getattr(saved, name) for name in sections})


def resumed_config(
    config: TrainConfig, loaded: LoadedCheckpoint, explicit: set[str]
) -> TrainConfig:
    """The checkpoint's settings with this command's folder, device and logging.

    Raises:
        CheckpointError: explicit values contradict the checkpoint.
    """
    saved = read_saved_config(loaded.json["config"], str(loaded.folder))
    if "run.seed" in explicit and config.run.seed != saved.run.seed:
        raise CheckpointError(
            f"--seed {config.run.seed}: the run in {loaded.folder.parent} has seed "
            f"{saved.run.seed}. Omit --seed to continue it."
        )
    # With another seed, precision or compiler the run would not continue bit for bit.
    kept = {name: getattr(saved.run, name) for name in ("seed", "precision", "compile")}
    config = config.model_copy(update={"run": config.run.model_copy(update=kept)})
    sections = tuple(s for s in TrainConfig.model_fields if s not in ("run", "preset"))
    return adopt_saved(config, saved, explicit, sections)


def explicit_keys(origins: dict[str, str]) -> set[str]:
    """Dotted keys whose value comes from the user, not from a default or a preset."""
    return {
        key
        for key, origin in origins.items()
        if origin not in ("default", "no data named") and not origin.startswith("preset ")
    }


def resolve_checkpoint(run: Path, which: str | int) -> Path:
    """The folder of the "best", "latest" or numbered checkpoint of a run.

    A run without a best checkpoint gives its latest. `run` may also be a checkpoint itself.
    """
    if step_of_folder(run.name) is not None:
        return find_checkpoint(run)
    if isinstance(which, int):
        return find_checkpoint(run / f"step-{which:08d}")
    if which == "best" and not (run / "best").exists():
        which = "latest"
    return find_checkpoint(run, pointer=which)
