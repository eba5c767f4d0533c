"""Earlier names and values of settings in files, flags, overrides and checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from dragkit.config import (
    FIELDS,
    TrainConfig,
    differing_settings,
    load_config,
    read_saved_config,
    resolve_config,
)
from dragkit.config.arguments import parse_train_args
from dragkit.config.resolve import REMOVED, RENAMED
from dragkit.errors import ConfigError

# An earlier key, an earlier value as text, and today's key and value.
EARLIER = [
    ("data.max_bad_share", "0.25", "data.max_bad_fraction", 0.25),
    ("retriever.message", "parity", "retriever.message", "per_instruction"),
    ("retriever.message", "collapsed", "retriever.message", "fused"),
    ("retriever.fact_relation", "instructed", "retriever.gate_relation_by_instruction", True),
    ("retriever.fact_relation", "static", "retriever.gate_relation_by_instruction", False),
    ("sampler.mode", "budget", "sampler.mode", "exact_k"),
    ("sampler.estimator", "concrete", "sampler.estimator", "binary_concrete"),
    ("sampler.estimator", "mean", "sampler.estimator", "straight_through"),
    ("generator.checkpointing", "all", "generator.activation_checkpointing", "all"),
    ("generator.tokens_per_pass", "512", "generator.max_tokens_per_microbatch", 512),
    ("generator.tokens_per_pass", "none", "generator.max_tokens_per_microbatch", None),
    ("generator.pack_multiple", "64", "generator.pad_to_multiple_of", 64),
    ("generator.mamba", "reference", "generator.mamba_backend", "reference"),
    ("optim.warmup_share", "0.1", "optim.warmup_ratio", 0.1),
    ("optim.min_lr_share", "0.2", "optim.min_lr_ratio", 0.2),
    ("run.sharding", "full", "run.generator_fsdp", True),
    ("run.sharding", "none", "run.generator_fsdp", False),
]


def value_of(config: TrainConfig, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def test_every_renamed_setting_is_tested_and_exists() -> None:
    assert {key for key, *_ in EARLIER} == set(RENAMED)
    assert {key for key, _ in RENAMED.values()} <= set(FIELDS)
    values = {(key, value) for key, value, *_ in EARLIER}
    assert values >= {(key, value) for key, (_, names) in RENAMED.items() for value in names}


@pytest.mark.parametrize(("key", "text", "new_key", "value"), EARLIER)
def test_an_earlier_name_means_the_same_in_every_source(
    key: str, text: str, new_key: str, value: object, tmp_path: Path
) -> None:
    section, name = key.split(".")
    args = parse_train_args(["--preset", "cwq", "--set", f"{key}={text}"])
    assert value_of(args.config, new_key) == value
    assert args.origins[new_key] == f"--set {key}"
    assert args.config_for_phase(1).run.phase == 1
    # Plain YAML reads none as text; null is its empty value.
    written = "null" if value is None else text
    (tmp_path / "run.yaml").write_text(f"{section}: {{{name}: {written}}}\n")
    config, origins = resolve_config(file=tmp_path / "run.yaml")
    assert value_of(config, new_key) == value
    renamed = "" if key == new_key else f", as {key}"
    assert origins[new_key] == f"{tmp_path / 'run.yaml'}{renamed}"
    given = text if key in ("run.sharding", "retriever.fact_relation") else written
    given = None if value is None else given
    assert value_of(load_config(overrides={key: given}), new_key) == value
    saved = TrainConfig().model_dump(mode="json")
    del saved[section][new_key.split(".")[1]]
    saved[section][name] = given
    assert value_of(read_saved_config(saved, "step-1"), new_key) == value


def test_of_two_spellings_on_the_command_line_the_last_wins() -> None:
    old, new = "generator.checkpointing", "generator.activation_checkpointing"
    for first, second in ((old, new), (new, old)):
        args = parse_train_args(["--set", f"{first}=all", "--set", f"{second}=mamba"])
        assert value_of(args.config, new) == "mamba"
        assert args.origins[new] == f"--set {second}"


def test_a_file_may_not_give_both_spellings(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optim: {warmup_share: 0.1, warmup_ratio: 0.2}\n")
    with pytest.raises(ConfigError, match=r"is given twice, as optim.warmup_share and as optim.w"):
        resolve_config(file=path)


def test_messages_name_what_the_user_wrote(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run: {sharding: half}\n")
    with pytest.raises(ConfigError, match=r"run.yaml, as run.sharding\).*'half'"):
        resolve_config(file=path)
    with pytest.raises(ConfigError, match=r"\(--set generator.checkpointing\): must be 'auto'"):
        parse_train_args(["--set", "generator.checkpointing=some"])
    with pytest.raises(ConfigError, match=r"did you mean --set optim.warmup_ratio=VALUE"):
        parse_train_args(["--warmup_share", "0.1"])


def test_a_saved_configuration_with_an_unknown_key_is_refused() -> None:
    saved = TrainConfig().model_dump(mode="json")
    assert read_saved_config(saved, "x") == TrainConfig()
    saved["optim"]["momentum"] = 0.9
    with pytest.raises(ConfigError, match=r"optim.momentum \(runs/a/step-1\): unknown key"):
        read_saved_config(saved, "runs/a/step-1")


def test_differing_settings_are_those_of_the_first_configuration() -> None:
    base = load_config("tiny")
    config = load_config("tiny", overrides={"optim.lr": 0.5, "generator.lora_targets": ("q_proj",)})
    assert differing_settings(base, base) == {}
    changed = {"optim.lr": 0.5, "generator.lora_targets": ("q_proj",)}
    assert differing_settings(config, base) == changed


@pytest.mark.parametrize("key", list(REMOVED))
def test_a_removed_setting_is_accepted_only_where_it_changes_nothing(
    key: str, tmp_path: Path
) -> None:
    section, name = key.split(".")
    neutral, reason = REMOVED[key]
    saved = TrainConfig().model_dump(mode="json")
    saved[section][name] = neutral
    assert read_saved_config(saved, "step-1") == TrainConfig()
    path = tmp_path / "run.yaml"
    path.write_text(f"{section}: {{{name}: true}}\n")
    for load in (
        lambda: resolve_config(file=path),
        lambda: load_config(overrides={key: True}),
        lambda: parse_train_args(["--set", f"{key}=true"]),
        lambda: read_saved_config({section: {name: True}}, "step-1"),
    ):
        with pytest.raises(ConfigError, match=f"{key}.*was removed: {reason[:30]}"):
            load()
