"""The folder of a run: how it is named and found, and what a run may find in it."""

from __future__ import annotations

import logging
import os
import shlex
import time
from itertools import count
from pathlib import Path
from typing import NamedTuple

from dragkit.checkpoint.atomic import make_dirs, write_text_atomically
from dragkit.checkpoint.checkpoint import LoadedCheckpoint, find_checkpoint, load_checkpoint
from dragkit.checkpoint.manifest import step_of_folder
from dragkit.checkpoint.retention import require_folder
from dragkit.config import TrainConfig, dump_config, read_saved_config
from dragkit.config.yaml_file import read_yaml
from dragkit.errors import ConfigError, CreateError, MissingInputError
from dragkit.trainer.resume import moved_with_run, resumed_config, saved_config

logger = logging.getLogger(__name__)

SETTINGS, PHASE1 = "config.yaml", "phase1"
_WRITTEN = ("latest", "best", "metrics.jsonl", "results.json", "test_predictions.jsonl", SETTINGS)


def claim_run_dir(config: TrainConfig) -> Path:
    """Makes a new folder under runs/, named after the time. No other run can have the same one.

    Raises:
        CreateError: it cannot be made.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = config.preset or Path(config.data.heuristics_path or "demo").name.split(".")[0]
    first = Path("runs") / f"{stamp}-phase{config.run.phase}-{name}"
    try:
        make_dirs(first.parent)
        for number in count(2):
            try:
                first.mkdir()
                return first
            except FileExistsError:
                # Runs that start in the same second are numbered.
                first = Path("runs") / f"{stamp}-phase{config.run.phase}-{name}-{number}"
    except OSError as error:
        raise CreateError(
            f"{first}: cannot be created: {error.strerror}. Name a folder with --checkpoint_dir."
        ) from error
    raise AssertionError("count() has no end")


def run_dir_of(folder: Path) -> Path:
    """The run folder of a run folder or of one of its checkpoints."""
    return folder.parent if step_of_folder(folder.name) is not None else folder


def require_run(folder: Path) -> None:
    """Refuses a path that is missing or a file.

    Raises:
        MissingInputError: there is no such folder.
        DataError: it is a file.
    """
    require_folder(folder)


def checkpoint_names(run_dir: Path) -> list[str]:
    """Names of a run's checkpoint folders, also of the phase 1 that phase 2 trains first."""
    return sorted(
        str(path.relative_to(run_dir))
        for folder in (run_dir, run_dir / PHASE1)
        for path in _checkpoints(folder)
    )


def _checkpoints(folder: Path) -> list[Path]:
    # Unlike pathlib, `os.path` raises for no name that is too long or may not be looked at.
    entries = folder.iterdir() if os.path.isdir(folder) else ()
    return [path for path in entries if step_of_folder(path.name) is not None]


def refuse_blocked_files(run_dir: Path) -> None:
    """Raises a CreateError where a folder or a pipe stands in the place of a run's file."""
    for folder in (run_dir, run_dir / PHASE1):
        for name in _WRITTEN:
            path = folder / name
            if os.path.exists(path) and not os.path.isfile(path):
                kind = "a folder" if os.path.isdir(path) else "a pipe or a device"
                raise CreateError(
                    f"{path} is {kind}, and a run writes a file of this name. Remove it, or name "
                    "another folder with --checkpoint_dir."
                )


def refuse_used_folder(run_dir: Path) -> None:
    """Raises a ConfigError where a new run would mix its checkpoints with an earlier one's."""
    if checkpoint_names(run_dir):
        raise ConfigError(
            f"run.checkpoint_dir: {run_dir} already holds a run. Continue it with --resume "
            f"{shlex.quote(str(run_dir))}, or name another folder."
        )


def resume_dir(config: TrainConfig) -> Path:
    """The run folder that `--resume` means.

    Without a name it is the newest run of this phase among those that dragkit named.

    Raises:
        MissingInputError: there is no such run.
    """
    if isinstance(config.run.resume, str):
        folder = run_dir_of(Path(config.run.resume))
        require_folder(folder)
        return folder
    if config.run.checkpoint_dir is not None:
        return Path(config.run.checkpoint_dir)
    # A run that failed before its first checkpoint also has a folder.
    runs = [p for p in Path("runs").glob(f"*-phase{config.run.phase}-*") if checkpoint_names(p)]
    if not runs:
        raise MissingInputError(
            "--resume: no run was named, and runs/ has no "
            f"<time>-phase{config.run.phase}-<name> with a checkpoint. Name one: --resume FOLDER."
        )
    return max(runs)


class ContinuedRun(NamedTuple):
    """Settings of a run and of the phase 1 that it trains first, with their newest checkpoints."""

    config: TrainConfig
    phase1_config: TrainConfig
    resumed: LoadedCheckpoint | None
    phase1_resumed: LoadedCheckpoint | None


def continued_run(run_dir: Path, command: ContinuedRun, explicit: set[str]) -> ContinuedRun:
    """What is continued in a folder: its own settings, with those that were given explicitly.

    Args:
        run_dir: folder of the run.
        command: settings of this command. They hold where the folder has none.
        explicit: keys that this command gives.

    Raises:
        CheckpointError: no checkpoint is intact, or an explicit value contradicts the run's.
        MissingInputError: `run.resume` names a folder that holds no run.
    """
    begun, first = _read_run(run_dir), _read_run(run_dir / PHASE1)
    if begun is None and first is None:
        if isinstance(command.config.run.resume, str):
            # Raises: a folder that is named must hold a run.
            find_checkpoint(run_dir)
        logger.info("%s holds no run yet, so one begins there", run_dir)
    config, phase1_config, resumed, phase1_resumed = command
    if begun is not None:
        saved, resumed = begun
        saved = moved_with_run(saved, run_dir)
        config = resumed_config(config, saved, explicit, str(run_dir))
    if first is not None and resumed is None:
        saved, phase1_resumed = first
        saved = moved_with_run(saved, run_dir / PHASE1)
        # Flags mean the training of phase 2. Those of `run`, such as the device, mean both.
        both = {key for key in explicit if key.startswith("run.")} - {"run.phase"}
        phase1_config = resumed_config(phase1_config, saved, both, str(run_dir / PHASE1))
    return ContinuedRun(config, phase1_config, resumed, phase1_resumed)


def _read_run(run_dir: Path) -> tuple[TrainConfig, LoadedCheckpoint | None] | None:
    """Settings and newest checkpoint of a run, or None for a folder in which no run was begun."""
    if _checkpoints(run_dir):
        loaded = load_checkpoint(find_checkpoint(run_dir))
        return saved_config(loaded), loaded
    settings = run_dir / SETTINGS
    if not os.path.isfile(settings):
        return None
    return read_saved_config(read_yaml(settings), str(settings)), None


def write_settings(run_dir: Path, config: TrainConfig) -> None:
    """Writes config.yaml, with which `--resume` continues a run that has no checkpoint yet.

    Raises:
        CreateError: it cannot be written.
    """
    try:
        make_dirs(run_dir)
        write_text_atomically(run_dir / SETTINGS, dump_config(config))
    except OSError as error:
        raise CreateError(
            f"{run_dir / SETTINGS}: cannot be written: {error.strerror}. Free some space, or name "
            "another folder with --checkpoint_dir."
        ) from error
