"""Merges a run's settings: defaults < preset < file < flags.

The models and their defaults are in `dragkit.config.schema`.
"""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from dragkit.config.schema import PRESETS, Section, TrainConfig
from dragkit.config.yaml_file import read_yaml
from dragkit.errors import ConfigError

SECTIONS: dict[str, type[Section]] = {
    name: info.annotation
    for name, info in TrainConfig.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, Section)
}
FIELDS = {"preset": TrainConfig.model_fields["preset"]} | {
    f"{section}.{name}": info
    for section, model in SECTIONS.items()
    for name, info in model.model_fields.items()
}
# Earlier names of settings and earlier values, by earlier name. Files, --set and the configurations
# in checkpoints may still use them.
RENAMED: dict[str, tuple[str, dict[str, str | bool]]] = {
    "data.max_bad_share": ("data.max_bad_fraction", {}),
    "retriever.message": (
        "retriever.message",
        {"collapsed": "fused", "parity": "per_instruction"},
    ),
    "retriever.fact_relation": (
        "retriever.gate_relation_by_instruction",
        {"static": False, "instructed": True},
    ),
    "sampler.mode": ("sampler.mode", {"budget": "exact_k"}),
    "sampler.estimator": (
        "sampler.estimator",
        {"concrete": "binary_concrete", "mean": "straight_through"},
    ),
    "generator.checkpointing": ("generator.activation_checkpointing", {}),
    "generator.tokens_per_pass": ("generator.max_tokens_per_microbatch", {}),
    "generator.pack_multiple": ("generator.pad_to_multiple_of", {}),
    "generator.mamba": ("generator.mamba_backend", {}),
    "optim.warmup_share": ("optim.warmup_ratio", {}),
    "optim.min_lr_share": ("optim.min_lr_ratio", {}),
    "run.sharding": ("run.generator_fsdp", {"none": False, "full": True}),
}
# Settings that are gone: the value that still means what the code does, and why. Files and saved
# configurations may hold that value.
_UNDRAWN = "its gradient was a million times the exact one. Use sampler.estimator=leave_one_out"
REMOVED: dict[str, tuple[object, str]] = {
    "sampler.undrawn_facts_vector": (False, _UNDRAWN),
    "sampler.residual_slot": (False, _UNDRAWN),
    "loss.bounded_draw_loss": (False, "loss.draw_objective=marginal retrieves better"),
}
_PHASE_BLOCKS = ("phase1", "phase2")
# A few aliases of YAML can make a value whose whole text would fill the memory.
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_PRESET_DIR = Path(__file__).with_name("presets")


@dataclass
class _Merged:
    """Values and their origins by dotted key, and the problems so far."""

    values: dict[str, object] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def update(self, settings: Mapping[str, object], origins: Mapping[str, str]) -> None:
        """Sets the values of one source, and notes unknown keys and settings given twice."""
        spellings: dict[str, str] = {}
        for written, given in settings.items():
            key, value = current_setting(written, given)
            origin = origins[written]
            if written in REMOVED:
                neutral, reason = REMOVED[written]
                if value not in (neutral, str(neutral).lower()):
                    self.problems.append(f"{key} ({origin}): was removed: {reason}")
                continue
            if key not in FIELDS:
                self.problems.append(f"{key} ({origin}): {_explain_unknown_key(key)}")
                continue
            if spellings.setdefault(key, written) != written:
                self.problems.append(
                    f"{key} ({origin}): is given twice, as {spellings[key]} and as {written}"
                )
            self.values[key] = value
            # The label of a flag holds the written name already.
            renamed = key != written and written not in origin
            self.origins[key] = f"{origin}, as {written}" if renamed else origin


def _explain_unknown_key(key: str) -> str:
    if key in SECTIONS:
        return f"is a section with the keys {', '.join(SECTIONS[key].model_fields)}"
    if near := nearest_key(key):
        return f"unknown key; did you mean {near}?"
    if section := SECTIONS.get(key.partition(".")[0]):
        return f"unknown key, because the section has only {', '.join(section.model_fields)}"
    return "unknown key (`python -m dragkit.config show` lists all)"


def current_setting(key: str, value: object) -> tuple[str, object]:
    """Today's key and value of a setting that may have an earlier name or an earlier value."""
    name, values = RENAMED.get(key, (key, {}))
    return name, values.get(value, value) if isinstance(value, str) else value


def nearest_key(key: str) -> str | None:
    """The dotted key that is most similar to an unknown one, or None."""
    # FIELDS come first: of equal names in several sections the schema's first one is suggested.
    known = [*FIELDS, *RENAMED]
    by_name = {name.rpartition(".")[2]: name for name in reversed(known)}
    name = key.rpartition(".")[2]
    near = by_name.get(name)
    if near is None:
        keys = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
        names = difflib.get_close_matches(name, by_name, n=1, cutoff=0.7)
        near = keys[0] if keys else by_name[names[0]] if names else None
    return None if near is None else current_setting(near, None)[0]


def parse_text(key: str, text: str) -> object:
    """Converts text from the command line to what the schema's field takes.

    Args:
        key: dotted key. The text of an unknown key is returned as it is.
        text: `none` empties an optional field. Commas separate the items of a list.

    Returns:
        The value. Numbers stay text, which the schema parses.
    """
    if key not in FIELDS:
        return text
    annotation = FIELDS[key].annotation
    options = (annotation, *get_args(annotation))
    # YAML would read `none` as text and `1e-4` as text too, so the annotation decides here.
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


def load_config(
    preset: str | None = None,
    file: str | Path | None = None,
    overrides: Mapping[str, object] | None = None,
) -> TrainConfig:
    """The configuration of a run, as the command line builds it.

    Args:
        preset: "tiny", "webqsp", "cwq", "h200" or "b200". None takes the preset that the file
            names, and "tiny" if no training data are given either.
        file: YAML file with sections and keys of the schema.
        overrides: values by dotted key, such as {"optim.lr": 1e-4}. They take precedence.

    Returns:
        The frozen configuration.

    Raises:
        ConfigError: lists every wrong key and value.
        MissingInputError: the file cannot be read.
    """
    return resolve_config(preset, file, overrides, demo_preset="tiny")[0]


def resolve_config(
    preset: str | None = None,
    file: str | Path | None = None,
    overrides: Mapping[str, object] | None = None,
    *,
    spellings: Mapping[str, str] | None = None,
    demo_preset: str | None = None,
) -> tuple[TrainConfig, dict[str, str]]:
    """Merges defaults < preset < file < overrides and checks the result.

    A preset or a file may hold blocks `phase1` and `phase2` with sections. A block applies on top
    of the rest in its phase only.

    Args:
        preset: name of a preset. None takes the one that the file names, if any.
        file: YAML file with any part of the schema.
        overrides: values by dotted key.
        spellings: how the user wrote keys of `overrides`, for messages and origins.
        demo_preset: preset for a run that names neither a preset nor training data.

    Returns:
        The configuration, and the origin of each dotted key: "default", "preset NAME", the file or
        the flag.

    Raises:
        ConfigError: lists every wrong key and value with its origin and reason.
        MissingInputError: the file cannot be read.
    """
    overrides, spellings = dict(overrides or {}), {"preset": "--preset", **(spellings or {})}
    if preset is not None:
        overrides["preset"] = preset
    # The preset and the phase are needed first: they decide which other settings apply.
    from_file = flatten_settings(read_yaml(Path(file)) if file is not None else {}, str(file))
    given = from_file[0] | overrides
    merged = _Merged()
    if demo_preset and "preset" not in given and given.get("data.heuristics_path") is None:
        given["preset"] = demo_preset
        merged.update({"preset": demo_preset}, {"preset": "no data named"})
    name = given.get("preset")
    preset_file = read_yaml(_PRESET_DIR / f"{name}.yaml") if name in PRESETS else {}
    from_preset = flatten_settings(preset_file)
    phase = (from_preset[0] | given).get("run.phase", FIELDS["run.phase"].default)
    for (plain, blocks), origin in ((from_preset, f"preset {name}"), (from_file, str(file))):
        merged.update(plain, dict.fromkeys(plain, origin))
        for block, settings in blocks.items():
            # The other phase's block does not apply, but its keys are checked too.
            target = merged if block == f"phase{phase}" else _Merged(problems=merged.problems)
            target.update(settings, dict.fromkeys(settings, f"{origin}, {block}"))
    merged.update(overrides, {key: spellings.get(key, "flag") for key in overrides})
    return _validate(merged), {key: merged.origins.get(key, "default") for key in FIELDS}


def read_saved_config(settings: object, origin: str) -> TrainConfig:
    """The configuration in a checkpoint, which may use earlier names.

    Args:
        settings: the dumped configuration.
        origin: folder of the checkpoint, for messages.

    Raises:
        ConfigError: the settings are not a mapping, or hold wrong keys or values. All are listed.
    """
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{origin}: the saved configuration is not a mapping.")
    merged, (plain, _) = _Merged(), flatten_settings(settings, origin)
    merged.update(plain, dict.fromkeys(plain, origin))
    return _validate(merged)


def differing_settings(config: TrainConfig, base: TrainConfig) -> dict[str, object]:
    """The settings of `config` that are not those of `base`, by dotted key."""
    values, base_values = (flatten_settings(c.model_dump())[0] for c in (config, base))
    return {key: value for key, value in values.items() if value != base_values[key]}


def dump_config(config: TrainConfig) -> str:
    """The whole configuration as YAML text, which `resolve_config(file=...)` reads."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def show_config(config: TrainConfig, origins: Mapping[str, str]) -> str:
    """One line per setting: dotted key, value as JSON, origin."""
    plain = flatten_settings(config.model_dump(mode="json"))[0]
    rows = [
        (key, json.dumps(value, ensure_ascii=False), origins[key]) for key, value in plain.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{k:<{widths[0]}}  {v:<{widths[1]}}  {origin}" for k, v, origin in rows)


def config_schema() -> str:
    """JSON Schema of a configuration file, for editors."""
    return json.dumps(TrainConfig.model_json_schema(), indent=2)


def flatten_settings(
    settings: Mapping[Any, object], origin: str = "the configuration"
) -> tuple[dict[str, object], dict[str, dict]]:
    """Values by dotted key, and the values of each phase block by dotted key.

    Args:
        settings: sections with keys, or dotted keys.
        origin: where the settings are from, for messages.

    Raises:
        ConfigError: a key is given both inside its section and dotted.
    """
    plain: dict[str, object] = {}
    blocks: dict[str, dict] = {}
    for key, value in settings.items():
        items = {str(key): value}
        if key in _PHASE_BLOCKS and isinstance(value, Mapping | None):
            # A block inside of a block is an unknown key.
            inner, nested = flatten_settings(value or {}, f"{origin}, {key}")
            blocks[key], items = inner | nested, {}
        elif key in SECTIONS and isinstance(value, Mapping | None):
            items = {f"{key}.{name}": item for name, item in (value or {}).items()}
        if twice := sorted(plain.keys() & items.keys()):
            raise ConfigError(
                f"{twice[0]} ({origin}): is given twice, dotted and inside its section"
            )
        plain |= items
    return plain, blocks


def _validate(merged: _Merged) -> TrainConfig:
    """Builds the configuration, or raises one error with all problems."""
    nested: dict[str, Any] = {}
    for key, value in merged.values.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    # Wrong keys and wrong values are reported together, so values are checked in any case.
    problems, config = list(merged.problems), None
    try:
        config = TrainConfig.model_validate(nested)
    except ValidationError as error:
        reasons: dict[str, str] = {}
        for item in error.errors(include_url=False):
            # Deeper parts of the location are indices of list items or branches of a union.
            key = ".".join(str(part) for part in item["loc"][:2])
            reason = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            if item["type"] == "string_pattern_mismatch":
                reason = f"must be like this: {FIELDS[key].description}"
            got = f" (got {_SHORT.repr(item['input']):.80})"
            reasons.setdefault(key, f"{key} ({merged.origins.get(key, 'default')}): {reason}{got}")
        problems += reasons.values()
    if config is None or problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(f"{count} in the configuration:\n{lines}")
    return config
