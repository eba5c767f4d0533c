"""Configuration of a run: defaults < preset < file < flags, merged and checked in one go.

The models and their defaults are in `dragkit.config.schema` and are exported here as well.
`python -m dragkit.config show` prints every value with its origin, `... schema` the JSON Schema.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import yaml
from pydantic import ValidationError

from dragkit.config.schema import PRESETS, Section, TrainConfig
from dragkit.errors import ConfigError, MissingInputError

SECTIONS: dict[str, type[Section]] = {
    name: info.annotation for name, info in TrainConfig.model_fields.items() if name != "preset"
}
FIELDS = {"preset": TrainConfig.model_fields["preset"]} | {
    f"{section}.{name}": info
    for section, model in SECTIONS.items()
    for name, info in model.model_fields.items()
}
_PHASE_BLOCKS = ("phase1", "phase2")
_PRESET_DIR = Path(__file__).with_name("presets")


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, where plain YAML keeps the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=deep)


@dataclass
class _Merged:
    """Values by dotted key, where each came from, and what is wrong so far."""

    values: dict[str, object] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, key: str, value: object, origin: str) -> None:
        """Set one dotted key, or note that there is no such key."""
        if key in FIELDS:
            self.values[key] = value
            self.origins[key] = origin
        elif key in SECTIONS:
            names = ", ".join(SECTIONS[key].model_fields)
            self.problems.append(f"{key} ({origin}): is a section with the keys {names}")
        else:
            near, section = nearest_key(key), SECTIONS.get(key.partition(".")[0])
            if near:
                hint = f"did you mean {near}?"
            elif section:
                hint = f"the section has {', '.join(section.model_fields)}"
            else:
                hint = "`python -m dragkit.config show` lists all"
            self.problems.append(f"{key} ({origin}): unknown key; {hint}")

    def add_all(self, values: Mapping[str, object], origins: Mapping[str, str]) -> None:
        """Set several."""
        for key, value in values.items():
            self.add(key, value, origins[key])


def nearest_key(key: str) -> str | None:
    """The known dotted key most like a wrong one, or None where none is like it."""
    leaves = {name.rpartition(".")[2]: name for name in reversed(FIELDS)}
    leaf = key.rpartition(".")[2]
    if leaf in leaves:
        return leaves[leaf]
    whole = difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.75)
    close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)
    return whole[0] if whole else leaves[close[0]] if close else None


def parse_text(key: str, text: str) -> object:
    """Turn text from the command line into what the schema's field takes.

    Args:
        key: dotted key, known or not (text for an unknown key is returned as it is).
        text: the text; `none` empties an optional field, commas separate the items of a list.

    Returns:
        The value; numbers stay text, which the schema reads.
    """
    if key not in FIELDS:
        return text
    annotation = FIELDS[key].annotation
    options = (annotation, *get_args(annotation))
    word = text.strip().lower()
    if word in ("none", "null") and type(None) in options:
        return None
    if word in ("true", "false") and bool in options:
        return word == "true"
    if tuple[str, ...] in options:
        return tuple(item.strip() for item in text.split(",") if item.strip())
    return next(
        (option for option in options if isinstance(option, int) and str(option) == word), text
    )


def resolve_config(
    preset: str | None = None,
    file: str | Path | None = None,
    overrides: Mapping[str, object] | None = None,
    *,
    labels: Mapping[str, str] | None = None,
    demo_preset: str | None = None,
) -> tuple[TrainConfig, dict[str, str]]:
    """Merge defaults < preset < file < overrides and check the whole.

    A preset or a file may hold blocks `phase1` and `phase2` with sections. A block applies on
    top of the rest, in that phase only.

    Args:
        preset: name of a preset; None takes the one that the file names, if any.
        file: YAML file with any part of the schema.
        overrides: values by dotted key, as flags give them.
        labels: for a dotted key of `overrides`, how the user wrote it (for messages and origins).
        demo_preset: preset to take where none is named and no training data is given.

    Returns:
        The configuration, and for each dotted key its origin: "default", "preset x", file or flag.

    Raises:
        ConfigError: every wrong key and value at once, each with dotted path and reason.
        MissingInputError: the file is not there or cannot be read.
    """
    overrides, labels = dict(overrides or {}), {"preset": "--preset", **(labels or {})}
    if preset is not None:
        overrides["preset"] = preset
    from_file = _flatten(_read_yaml(Path(file)) if file is not None else {})
    named = from_file[0] | overrides
    merged = _Merged()
    if demo_preset and "preset" not in named and named.get("data.heuristics_path") is None:
        named["preset"] = demo_preset
        merged.add("preset", demo_preset, "no data named")
    chosen = named.get("preset")
    from_preset = _flatten(_read_yaml(_PRESET_DIR / f"{chosen}.yaml") if chosen in PRESETS else {})
    phase = (from_preset[0] | named).get("run.phase", FIELDS["run.phase"].default)
    for (plain, blocks), origin in ((from_preset, f"preset {chosen}"), (from_file, str(file))):
        merged.add_all(plain, dict.fromkeys(plain, origin))
        for block, settings in blocks.items():
            # The block of the other phase is not applied, but its keys are checked all the same.
            target = merged if block == f"phase{phase}" else _Merged(problems=merged.problems)
            target.add_all(settings, dict.fromkeys(settings, f"{origin}, {block}"))
    merged.add_all(overrides, {key: labels.get(key, "flag") for key in overrides})
    return _validate(merged), {key: merged.origins.get(key, "default") for key in FIELDS}


def dump_config(config: TrainConfig) -> str:
    """The whole configuration as YAML text that `resolve_config(file=...)` reads back unchanged."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def show_config(config: TrainConfig, origins: Mapping[str, str]) -> str:
    """One line for each value: dotted key, value as YAML would have it, origin."""
    flat = _flatten(config.model_dump(mode="json"))[0]
    rows = [
        (key, json.dumps(value, ensure_ascii=False), origins[key]) for key, value in flat.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{k:<{widths[0]}}  {v:<{widths[1]}}  {origin}" for k, v, origin in rows)


def config_schema() -> str:
    """JSON Schema of a configuration file, for editors."""
    return json.dumps(TrainConfig.model_json_schema(), indent=2)


def _flatten(settings: Mapping[object, object]) -> tuple[dict[str, object], dict[str, dict]]:
    """Split nested settings into values by dotted key, and blocks by name of the same."""
    plain: dict[str, object] = {}
    blocks: dict[str, dict] = {}
    for key, value in settings.items():
        if key in _PHASE_BLOCKS and isinstance(value, Mapping | None):
            blocks[key] = _flatten(value or {})[0]
        elif key in SECTIONS and isinstance(value, Mapping | None):
            plain |= {f"{key}.{name}": item for name, item in (value or {}).items()}
        else:
            plain[str(key)] = value
    return plain, blocks


def _read_yaml(path: Path) -> Mapping[object, object]:
    """Read one settings file. An empty file holds no settings."""
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise MissingInputError(
            f"{path}: cannot read the configuration file: {error.strerror}; check --config"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a UTF-8 text file, so not a YAML configuration") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(
            f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}"
        ) from error
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise ConfigError(
            f"{path}: must hold sections such as `optim:` with keys, not {settings!r:.60}"
        )
    return settings


def _validate(merged: _Merged) -> TrainConfig:
    """Build the configuration, or raise one error that lists everything wrong."""
    nested: dict[str, object] = {}
    for key, value in merged.values.items():
        section, _, name = key.rpartition(".")
        if section:
            nested.setdefault(section, {})[name] = value
        else:
            nested[name] = value
    problems, config = list(merged.problems), None
    try:
        config = TrainConfig.model_validate(nested)
    except ValidationError as error:
        reasons = {}
        for item in error.errors(include_url=False):
            key = ".".join(str(part) for part in item["loc"][:2])
            reason = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            if item["type"] == "string_pattern_mismatch":
                reason = f"must be like this: {FIELDS[key].description}"
            got = f" (got {item['input']!r:.80})"
            reasons.setdefault(key, f"{key} ({merged.origins.get(key, 'default')}): {reason}{got}")
        problems += reasons.values()
    if config is None or problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(f"{count} in the configuration:\n{lines}")
    return config
