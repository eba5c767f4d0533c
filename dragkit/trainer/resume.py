"""Which folder a run lives in, and what a resumed run takes from its checkpoint."""

from __future__ import annotations

import time
from pathlib import Path

from dragkit.checkpoint.checkpoint import LoadedCheckpoint, find_checkpoint, load_checkpoint
from dragkit.checkpoint.manifest import step_of_folder
from dragkit.config import TrainConfig, read_saved_config
from dragkit.errors import CheckpointError, ConfigError, MissingInputError


def new_run_dir(config: TrainConfig) -> Path:
    """The folder of this run: the one named, or a new one under runs/."""
    if config.run.checkpoint_dir is not None:
        return Path(config.run.checkpoint_dir)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = config.preset or Path(config.data.heuristics_path or "demo").name.split(".")[0]
    return Path("runs") / f"{stamp}-phase{config.run.phase}-{name}"


def run_dir_of(folder: Path) -> Path:
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
        return run_dir_of(Path(config.run.resume))
    if config.run.checkpoint_dir is not None:
        return Path(config.run.checkpoint_dir)
    runs = sorted(p for p in Path("runs").glob(f"*-phase{config.run.phase}-*") if p.is_dir())
    if not runs:
        raise MissingInputError(
            "--resume: no run was named and there is none under runs/. Name one: --resume FOLDER."
        )
    return runs[-1]


def load_for_resume(run_dir: Path, phase_name: str) -> LoadedCheckpoint:
    """The newest checkpoint of a run, which must be of the phase that goes on."""
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
    saved = read_saved_config(loaded.json["config"], str(loaded.folder))
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


def resolve_checkpoint(run: Path, which: str | int) -> Path:
    """The checkpoint that is meant: best (or latest, where there is no best), latest, a step."""
    if step_of_folder(run.name) is not None:
        return find_checkpoint(run)
    if isinstance(which, int):
        return find_checkpoint(run / f"step-{which:08d}")
    if which == "best" and not (run / "best").exists():
        which = "latest"
    return find_checkpoint(run, pointer=which)
