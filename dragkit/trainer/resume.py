"""What a checkpoint holds of its run: settings, which a later command may change, and inputs."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from dragkit import __version__
from dragkit.checkpoint.checkpoint import LoadedCheckpoint, find_checkpoint
from dragkit.checkpoint.manifest import step_of_folder
from dragkit.config import TINY_GENERATOR, TrainConfig, read_saved_config
from dragkit.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

# What a run reads. A resumed run may find it in another place.
_FILES = ("data.heuristics_path", "data.val_heuristics_path", "data.test_heuristics_path")
_MODELS = ("encoder.model", "generator.model")
# Fingerprints in `TrainState.extra`, by key.
_INPUTS = {
    "data": "training questions",
    "val": "validation questions",
    "test": "test questions",
    "encoder": "sentence encoder",
    "generator": "generator",
    "tokenizer": "files of the generator's tokenizer",
}
# Settings outside of `run` that a resumed run may change. The schedule follows them from its step.
_MAY_CHANGE = {
    *("optim.epochs", "optim.lr", "optim.lora_lr", "optim.lora_lr_scale", "data.cache_dir"),
    *("data.num_workers",),
}
# Settings of `run` without which a resumed run would not continue bit for bit.
_FIXED = {"run.phase", "run.seed", "run.precision", "run.compile"}
# These are always the command's own.
_OWN = {"run.resume", "run.checkpoint_dir"}


def saved_config(loaded: LoadedCheckpoint) -> TrainConfig:
    """The configuration in a checkpoint.

    Raises:
        CheckpointError: a newer version has saved it, with settings that this one does not know.
        ConfigError: it holds wrong settings.
    """
    try:
        return read_saved_config(loaded.json["config"], str(loaded.folder))
    except ConfigError as error:
        version = str(loaded.state.extra.get("dragkit", ""))
        if _numbers(version) <= _numbers(__version__):
            raise
        raise CheckpointError(
            f"{loaded.folder}: dragkit {version} has saved this checkpoint, and this is dragkit "
            f"{__version__}, which does not know all of its settings. Update dragkit."
        ) from error


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def explicit_keys(origins: dict[str, str]) -> set[str]:
    """Dotted keys whose value comes from the user, not from a default or a preset."""
    return {
        key
        for key, origin in origins.items()
        if origin not in ("default", "no data named") and not origin.startswith("preset ")
    }


def value_of(config: TrainConfig, key: str) -> object:
    """The value of a dotted key."""
    section, _, name = key.rpartition(".")
    return getattr(getattr(config, section) if section else config, name)


def with_values(config: TrainConfig, values: dict[str, object]) -> TrainConfig:
    """The configuration with other values of dotted keys, which the caller has checked."""
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        changed = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: changed})
    return config


def adopt_saved(
    config: TrainConfig, saved: TrainConfig, explicit: set[str], sections: tuple[str, ...]
) -> TrainConfig:
    """The configuration with whole sections replaced by those of a phase 1.

    Raises:
        CheckpointError: explicit values contradict it. The message lists all of them.
    """
    given = {key for key in explicit if key.partition(".")[0] in sections}
    if clashes := _clashes(config, saved, given):
        raise CheckpointError(
            "these settings differ from the checkpoint's:\n"
            + "\n".join(clashes)
            + "\nOmit them, or train phase 1 again with them."
        )
    return config.model_copy(update={name: getattr(saved, name) for name in sections})


def resumed_config(
    config: TrainConfig, saved: TrainConfig, explicit: set[str], where: str
) -> TrainConfig:
    """The settings of a run that this command continues: its own, with what was given explicitly.

    Files and models may be given in another place. Their content is compared once they are read.

    Args:
        config: settings of this command.
        saved: settings of the run.
        explicit: keys that this command gives.
        where: folder of the run.

    Raises:
        CheckpointError: explicit values contradict the run's. The message lists all of them.
    """
    free = {
        key
        for key in explicit
        if key in _MAY_CHANGE or (key.startswith("run.") and key not in _FIXED)
    }
    places = {
        key
        for key in explicit & {*_FILES, *_MODELS}
        # A file where the run had none is another run.
        if value_of(config, key) is not None and value_of(saved, key) is not None
    }
    if clashes := _clashes(config, saved, explicit - free - places - _OWN):
        raise CheckpointError(
            f"{where}: these settings are fixed when a run begins:\n"
            + "\n".join(clashes)
            + "\nOmit them, or start a new run in another folder."
        )
    changed = {
        key: value_of(config, key)
        for key in sorted(free | places)
        if key not in _OWN and value_of(config, key) != value_of(saved, key)
    }
    if changed:
        shown = (f"{key} {value_of(saved, key)} -> {value}" for key, value in changed.items())
        logger.info("%s continues with other settings: %s", where, ", ".join(shown))
    changed |= {"run.resume": config.run.resume, "run.checkpoint_dir": config.run.checkpoint_dir}
    return with_values(saved, changed)


def _clashes(config: TrainConfig, saved: TrainConfig, keys: set[str]) -> list[str]:
    return [
        f"  {key}: {given} was given, the checkpoint has {kept}"
        for key in sorted(keys)
        if (given := value_of(config, key)) != (kept := value_of(saved, key))
    ]


def require_same_inputs(loaded: LoadedCheckpoint, inputs: Mapping[str, str], remedy: str) -> None:
    """Compares the content of what a command reads with what the run was trained on.

    Args:
        loaded: the run's checkpoint. One of an earlier version lacks fingerprints.
        inputs: fingerprints by key of `TrainState.extra`.
        remedy: what to do if they differ.

    Raises:
        CheckpointError: names every input that differs.
    """
    extra = loaded.state.extra
    other = [_INPUTS[key] for key, value in inputs.items() if extra.get(key, value) != value]
    if other:
        version = extra.get("dragkit", __version__)
        cause = f" dragkit {version} saved it, this is {__version__}." * (version != __version__)
        raise CheckpointError(
            f"{loaded.folder}: its run was trained with other {' and other '.join(other)} than "
            f"this command reads.{cause} {remedy}"
        )


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The configuration with absolute paths, which hold in every working directory."""
    paths = {*_FILES, "data.cache_dir", "run.checkpoint_dir", "run.phase1_checkpoint"}
    # A model may also be a name.
    paths |= {key for key in _MODELS if os.path.isdir(str(value_of(config, key) or ""))}
    if config.generator_model == TINY_GENERATOR:
        paths.discard("generator.model")
    given = {key: value_of(config, key) for key in sorted(paths)}
    return with_values(
        config, {key: os.path.abspath(str(path)) for key, path in given.items() if path is not None}
    )


def moved_with_run(saved: TrainConfig, run_dir: os.PathLike[str]) -> TrainConfig:
    """The settings of a run whose folder was moved together with what it reads.

    A saved path that does not exist is looked for at the same place relative to the run's folder.
    """
    before = saved.run.checkpoint_dir
    if before is None or not os.path.isabs(before):
        return saved
    found: dict[str, object] = {}
    for key in (*_FILES, *_MODELS):
        path = value_of(saved, key)
        if path is None or not os.path.isabs(str(path)) or os.path.exists(str(path)):
            continue
        candidate = os.path.normpath(os.path.join(run_dir, os.path.relpath(str(path), before)))
        if os.path.exists(candidate):
            logger.info("%s: %s is not there, so %s is taken", key, path, candidate)
            found[key] = os.path.abspath(candidate)
    return with_values(saved, found)


def resolve_checkpoint(run: Path, which: str | int) -> Path:
    """The folder of the "best", "latest" or numbered checkpoint of a run.

    A run without a best checkpoint gives its latest. `run` may also be a checkpoint itself.
    """
    if step_of_folder(run.name) is not None:
        return find_checkpoint(run)
    if isinstance(which, int):
        return find_checkpoint(run / f"step-{which:08d}")
    if which == "best" and not os.path.exists(run / "best"):
        which = "latest"
    return find_checkpoint(run, pointer=which)
