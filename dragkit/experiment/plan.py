"""An experiment's file, and the runs that it asks for.

Every run's configuration is resolved before any run starts, so that all mistakes are reported at
once and by their place in the file.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from dragkit.config.resolve import (
    FIELDS,
    current_setting,
    differing_settings,
    flatten_settings,
    parse_text,
    resolve_config,
)
from dragkit.config.schema import Section, TrainConfig
from dragkit.config.yaml_file import read_yaml
from dragkit.errors import ConfigError, MissingInputError

# Names become folders.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# Settings by section and key or by dotted key, with blocks `phase1` and `phase2`.
Block = dict[str, object]
_PLACE = "run.checkpoint_dir run.phase1_checkpoint run.resume run.num_threads run.device"
_RESERVED = {"run.phase", "run.seed", "run.test_before_training", *_PLACE.split()}
_FILES = ("heuristics_path", "val_heuristics_path", "test_heuristics_path")
_VARIABLE = re.compile(r"\$\{(\w+)\}")


class ExperimentFile(Section):
    """The content of an experiment's file.

    Attributes:
        name: names the folder of the runs and the title of the document.
        introduction: Markdown that the document begins with.
        seeds: one run per seed.
        data: by name of a data set, the settings of its runs. A key without a section is one of
            `data`.
        settings: of all runs.
        arms: by name of an arm, its settings in phase 2. Its block `phase1` is for the phase 1
            that it starts from.
        baseline: the arm that the others are compared with.
        metrics: columns of the table.
    """

    name: Name
    introduction: str | None = None
    seeds: tuple[Seed, ...] = Field(min_length=1)
    data: dict[Name, Block] = Field(min_length=1)
    settings: Block = Field(default_factory=dict)
    arms: dict[Name, Block] = Field(min_length=1)
    baseline: Name | None = None
    metrics: tuple[str, ...] = Field(min_length=1)

    @field_validator("seeds", "metrics")
    @classmethod
    def _no_item_twice(cls, items: tuple[object, ...]) -> tuple[object, ...]:
        if len(set(items)) < len(items):
            raise ValueError("an item is given twice")
        return items

    @field_validator("baseline")
    @classmethod
    def _is_an_arm(cls, name: str | None, info: ValidationInfo) -> str | None:
        arms = info.data.get("arms", {name})
        if name is not None and name not in arms:
            raise ValueError(f"must be one of the arms {', '.join(arms)}")
        return name


@dataclass(frozen=True, eq=False)
class Run:
    """One `python -m dragkit.train` command.

    Attributes:
        data: name of the data set.
        arm: name of the arm, empty for a phase 1.
        seed: its seed.
        folder: its folder within that of the experiment.
        arguments: its settings as arguments, with `${VARIABLE}` as in the file.
        config: its configuration, without folders, device and threads.
        first: the phase 1 that it starts from, None for a phase 1.
    """

    data: str
    arm: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    config: TrainConfig
    first: Run | None

    def __str__(self) -> str:
        return f"{self.data} seed {self.seed} {self.folder.name}"


@dataclass(frozen=True)
class Experiment:
    """An experiment's file, its text, and its runs with every phase 1 before what needs it."""

    file: ExperimentFile
    text: str
    runs: tuple[Run, ...]


def read_experiment(path: Path) -> Experiment:
    """Reads an experiment's file and resolves the configuration of each run.

    Raises:
        ConfigError: lists every unknown key, wrong value, unset variable and missing file.
        MissingInputError: the file cannot be read.
    """
    if not path.is_file():
        raise MissingInputError(f"{path}: no such file. Name the YAML file of an experiment.")
    # Keys keep the order and drop what several runs have in common.
    problems: dict[str, None] = {}
    file = _parse(path, problems)
    runs = _plan(file, problems) if file is not None else ()
    if file is None or problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(f"{path}: {count} in the experiment:\n{lines}")
    return Experiment(file, path.read_text(encoding="utf-8"), runs)


def _parse(path: Path, problems: dict[str, None]) -> ExperimentFile | None:
    """The file's content, or None where its form is wrong. An unknown key is a problem alone."""
    content = dict(read_yaml(path))
    for key in [key for key in content if key not in ExperimentFile.model_fields]:
        known = ", ".join(ExperimentFile.model_fields)
        problems[f"{key}: unknown key; the keys of an experiment are {known}"] = None
        del content[key]
    # An arm without settings is written as a name alone.
    for key in ("data", "arms"):
        blocks = content.get(key)
        if isinstance(blocks, Mapping):
            content[key] = {name: {} if b is None else b for name, b in blocks.items()}
    try:
        return ExperimentFile.model_validate(content)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            key = ".".join(str(part) for part in item["loc"] if part != "[key]")
            reason = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            problems[f"{key}: {reason} (got {item['input']!r:.80})"] = None
        return None


def _plan(file: ExperimentFile, problems: dict[str, None]) -> tuple[Run, ...]:
    """The runs that can be resolved. What is wrong with the others is noted."""
    arms: list[Run] = []
    for data, seed in itertools.product(file.data, file.seeds):
        place = Path(data, f"seed-{seed}")
        # Arms with equal settings of phase 1 share it. The first one is that without an arm's own.
        firsts: list[Run] = []
        for arm in ("", *file.arms):
            resolved = _resolve(file, data, arm, seed, 1, problems)
            second = _resolve(file, data, arm, seed, 2, problems) if arm else None
            if resolved is None:
                continue
            first = next((run for run in firsts if run.config == resolved.config), None)
            if first is None:
                folder = place / (f"phase1-{arm}" if arm else "phase1")
                first = Run(data, "", seed, folder, resolved.arguments, resolved.config, None)
                firsts.append(first)
            if second is None:
                continue
            for key in differing_settings(second.config, first.config):
                if key in second.given and key.startswith(("retriever.", "encoder.")):
                    problems[
                        f"{key} (arms.{arm}): differs from phase 1, whose retriever phase 2 takes "
                        "over. Give it in the arm's block phase1, too, or in settings."
                    ] = None
            folder = place / f"arm-{arm}"
            arms.append(Run(data, arm, seed, folder, second.arguments, second.config, first))
    return (*dict.fromkeys(run.first for run in arms if run.first is not None), *arms)


def _layers(
    file: ExperimentFile, data: str, arm: str, phase: int
) -> Iterator[tuple[str, dict[str, object]]]:
    """The settings of a run with their places in the file. Later ones override earlier ones."""
    for place, block in (("settings", file.settings), (f"data.{data}", file.data[data])):
        plain, blocks = flatten_settings(block)
        if place != "settings":
            plain = {_of_data(key): value for key, value in plain.items()}
        yield place, plain
        yield f"{place}.phase{phase}", blocks.get(f"phase{phase}", {})
    plain, blocks = flatten_settings(file.arms.get(arm, {}))
    if phase == 2:
        yield f"arms.{arm}", plain
    yield f"arms.{arm}.phase{phase}", blocks.get(f"phase{phase}", {})


def _of_data(key: str) -> str:
    return f"data.{key}" if f"data.{key}" in FIELDS else key


class _Resolved(NamedTuple):
    """Arguments and configuration of a run, and the keys that the file gives."""

    arguments: tuple[str, ...]
    config: TrainConfig
    given: set[str]


def _resolve(
    file: ExperimentFile, data: str, arm: str, seed: int, phase: int, problems: dict[str, None]
) -> _Resolved | None:
    """Resolves a run, or notes what is wrong with it and returns None."""
    texts: dict[str, str] = {}
    places: dict[str, str] = {}
    for place, settings in _layers(file, data, arm, phase):
        for written, value in settings.items():
            key, text = current_setting(written, setting_text(value))
            texts[key], places[key] = str(text), place
    for key in [key for key in texts if key in _RESERVED]:
        problems[f"{key} ({places[key]}): is set by the experiment. Omit it."] = None
    for key, text in texts.items():
        for name in _VARIABLE.findall(text):
            if name not in os.environ:
                problems[f"{key} ({places[key]}): the variable {name} is not set"] = None
    given = {key: parse_text(key, expand(text)) for key, text in texts.items()}
    problems |= dict.fromkeys(_missing_files(data, given))
    own = {"run.phase": phase, "run.seed": seed, "run.test_before_training": False}
    try:
        config, _ = resolve_config(overrides=given | own, spellings=places, demo_preset="tiny")
    except ConfigError as error:
        # The first line counts the problems of this run.
        problems |= dict.fromkeys(line.strip() for line in str(error).splitlines()[1:])
        return None
    arguments = ["--phase", str(phase), "--seed", str(seed)]
    for key, text in {**texts, "run.test_before_training": "false"}.items():
        arguments += ["--preset", text] if key == "preset" else ["--set", f"{key}={text}"]
    return _Resolved(tuple(arguments), config, set(given))


def setting_text(value: object) -> str:
    """The text of a value from YAML, as `--set` takes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(setting_text, value))
    return str(value)


def expand(text: str) -> str:
    """The text with the values of its `${VARIABLE}`s. Unset ones stay."""
    return _VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), text)


def question_files(config: TrainConfig) -> dict[str, str]:
    """The question files of a configuration by key. The bundled demo has none."""
    return {key: path for key in _FILES if (path := getattr(config.data, key)) is not None}


def _missing_files(data: str, given: Mapping[str, object]) -> Iterator[str]:
    paths = {key: str(given[key]) for key in map("data.{}".format, _FILES) if given.get(key)}
    for key, path in paths.items():
        # A variable that is not set has been noted.
        if not _VARIABLE.search(path) and not Path(path).is_file():
            yield f"{key} (data.{data}): {path}: no such file"
    if "data.heuristics_path" in paths and "data.test_heuristics_path" not in paths:
        yield f"data.test_heuristics_path (data.{data}): is missing. Name the test questions."
