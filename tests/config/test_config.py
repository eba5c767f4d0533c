"""The schema, and the merging of settings from presets, files and flags."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dragkit.config import (
    FIELDS,
    PRESETS,
    SECTIONS,
    TrainConfig,
    config_schema,
    dump_config,
    parse_text,
    resolve_config,
    show_config,
)
from dragkit.errors import ConfigError, MissingInputError

ROOT = Path(__file__).resolve().parents[2]
PRESET_DIR = ROOT / "dragkit" / "config" / "presets"


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# Valid settings, with texts and numbers that plain YAML would read as something else.
TEXTS = st.one_of(
    st.text(min_size=1, max_size=20),
    st.sampled_from(
        ["null", "none", "1e-4", "yes", "true", "012", "a: b", "- x", "#", " ", "\x85"]
    ),
)
POSITIVE = st.floats(min_value=1e-12, max_value=1e12)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "preset": st.sampled_from(PRESETS),
        "data.heuristics_path": TEXTS,
        "data.max_facts_per_batch": st.integers(1, 10**12),
        "data.max_bad_fraction": st.floats(0, 1, exclude_max=True),
        "encoder.model": TEXTS,
        "sampler.temperature": POSITIVE,
        "sampler.k_facts": st.integers(1, 100),
        "generator.model": TEXTS,
        "generator.lora_targets": st.lists(TEXTS, min_size=1, max_size=3).map(tuple),
        "generator.freeze_lm": st.booleans(),
        "loss.rho": st.floats(0, 1),
        "optim.lr": POSITIVE,
        "optim.epochs": st.none() | st.integers(1, 10**6),
        "run.phase": st.sampled_from([1, 2]),
        "run.seed": st.integers(0, 2**32 - 1),
        "run.resume": st.booleans() | TEXTS,
        "run.compile": st.none() | st.booleans(),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(SETTINGS)
def test_a_dumped_configuration_loads_back_unchanged(
    tmp_path_factory: pytest.TempPathFactory, overrides: dict
) -> None:
    config, _ = resolve_config(overrides=overrides)
    for key, value in overrides.items():
        section, _, name = key.rpartition(".")
        assert getattr(getattr(config, section) if section else config, name) == value

    path = write(tmp_path_factory.getbasetemp(), dump_config(config))

    assert resolve_config(file=path)[0] == config
    # A complete file is not changed by the demo's preset.
    assert resolve_config(file=path, demo_preset="tiny")[0] == config


def test_a_later_source_wins_and_origins_say_which(tmp_path: Path) -> None:
    path = write(tmp_path, "optim: {lr: 1e-4, epochs: 7}\nsampler: {k_facts: 12}\n")
    config, origins = resolve_config(
        "b200", path, {"optim.epochs": 3}, spellings={"optim.epochs": "--epochs"}
    )

    assert (config.optim.batch_size, origins["optim.batch_size"]) == (4, "preset b200, phase2")
    assert (config.sampler.k_facts, origins["sampler.k_facts"]) == (12, str(path))
    assert (config.optim.lr, origins["optim.lr"]) == (1e-4, str(path))
    assert (config.optim.epochs, origins["optim.epochs"]) == (3, "--epochs")
    assert (config.loss.rho, origins["loss.rho"]) == (0.7, "default")
    assert (config.preset, origins["preset"]) == ("b200", "--preset")
    assert list(origins) == list(FIELDS)


def test_a_block_for_one_phase_applies_in_that_phase_only(tmp_path: Path) -> None:
    path = write(tmp_path, "optim: {lr: 1}\nphase1: {optim: {lr: 2}}\nphase2: {optim: {lr: 3}}\n")
    for overrides, lr in (({}, 3), ({"run.phase": 1}, 2), ({"optim.lr": 4}, 4)):
        assert resolve_config(file=path, overrides=overrides)[0].optim.lr == lr


def test_the_preset_comes_from_the_flag_the_file_or_the_demo(tmp_path: Path) -> None:
    named = write(tmp_path, "preset: webqsp\n")
    assert resolve_config(file=named)[0].retriever.num_stages == 3
    assert resolve_config("cwq", named)[0].retriever.num_instructions == 3
    data = {"data.heuristics_path": "x.jsonl"}
    assert resolve_config(demo_preset="tiny")[0].preset == "tiny"
    assert resolve_config(overrides=data, demo_preset="tiny")[0].preset is None
    assert resolve_config("cwq", demo_preset="tiny")[0].preset == "cwq"
    none = write(tmp_path, "preset: null\n")
    assert resolve_config(file=none, demo_preset="tiny")[0].preset is None


def test_everything_wrong_is_reported_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        lr: 3
        sampler: 3
        optim: {learning_rate: 1, lr: -1, epochs: yes, warmup_ratio: .nan}
        run: {device: tpu, profile_steps: '5:2', checkpoint_dir: ''}
        phase1: {optim: {lrr: 1}}
        rubbish: 1
        7: seven
        """,
    )
    overrides = {"sampler.k_facts": 200, "retriever.node_dim": 128, "loss.rhoo": 0.5}
    with pytest.raises(ConfigError) as caught:
        resolve_config("h20", path, overrides, spellings={"sampler.k_facts": "--k_facts"})
    lines = str(caught.value).splitlines()
    reports = {line.split()[0]: line for line in lines[1:]}

    assert lines[0] == f"{len(reports)} problems in the configuration:"
    assert reports.keys() == {
        *("7", "rubbish", "lr", "sampler", "preset", "loss.rhoo"),
        *("optim.learning_rate", "optim.lrr", "optim.lr", "optim.epochs", "optim.warmup_ratio"),
        *("run.device", "run.profile_steps", "run.checkpoint_dir"),
        *("retriever.node_dim", "sampler.k_facts"),
    }
    assert "did you mean optim.lr?" in reports["lr"]
    assert "did you mean optim.lr?" in reports["optim.lrr"]
    assert "phase1" in reports["optim.lrr"]
    assert "did you mean loss.rho?" in reports["loss.rhoo"]
    assert "weight_decay" in reports["optim.learning_rate"]
    assert "is a section with the keys mode" in reports["sampler"]
    assert "(--k_facts)" in reports["sampler.k_facts"]
    assert "max_facts_cap (100)" in reports["sampler.k_facts"]
    assert "ReaRev" in reports["retriever.node_dim"]
    assert "greater than 0 (got -1)" in reports["optim.lr"]
    assert str(path) in reports["optim.lr"]
    assert "true or false" in reports["optim.epochs"]
    assert "cuda:N" in reports["run.device"]
    assert "'tiny'" in reports["preset"]


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("run.phase", 3),
        ("run.seed", 2**32),
        ("run.profile_steps", "3"),
        ("run.device", "cuda:"),
        ("sampler.temperature", 0),
        ("sampler.prob_threshold", 1),
        ("sampler.mode", "topk"),
        ("loss.rho", 1.01),
        ("loss.margin", float("inf")),
        ("optim.epochs", 0),
        ("optim.batch_size", 1.5),
        ("optim.lr", None),
        ("generator.lora_targets", []),
        ("generator.lora_targets", [1]),
        ("generator.freeze_lm", "maybe"),
        ("data.max_bad_fraction", 1),
        ("retriever.dropout", -0.1),
        ("encoder.model", ""),
    ],
)
def test_a_value_out_of_range_names_its_key(key: str, bad: object) -> None:
    with pytest.raises(ConfigError, match="^1 problem") as caught:
        resolve_config(overrides={key: bad})
    assert f"  {key} (flag): " in str(caught.value)


def test_values_must_agree_with_one_another() -> None:
    with pytest.raises(ConfigError, match="sampler.k_facts .default.: .*max_facts_cap .5."):
        resolve_config(overrides={"sampler.max_facts_cap": 5})
    without = {"generator.structural_vectors": False, "generator.fact_text": False}
    with pytest.raises(ConfigError, match=r"structural_vectors .*fact_text"):
        resolve_config(overrides=without)
    same = {f"retriever.{name}": 64 for name in ("hidden_dim", "node_dim", "relation_dim")}
    assert resolve_config(overrides=same)[0].retriever.relation_dim == 64
    with pytest.raises(ConfigError, match=r"retriever.relation_dim .*hidden_dim \(64\)"):
        resolve_config(overrides={**same, "retriever.relation_dim": 32})


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b"optim: {lr: 1", ":1: not valid YAML"),
        (b"optim:\n  lr: 1\n  lr: 2\n", ":3: not valid YAML: the key 'lr' is given twice"),
        (b"run: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        (b"- 1\n- 2\n", "must hold sections"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_a_file_without_a_configuration_is_named(
    tmp_path: Path, content: bytes, where: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(where)) as caught:
        resolve_config(file=path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(MissingInputError, match=re.escape(str(path))):
            resolve_config(file=path)


def test_an_empty_file_and_empty_sections_change_nothing(tmp_path: Path) -> None:
    assert resolve_config(file=write(tmp_path, "# nothing\n"))[0] == TrainConfig()
    assert resolve_config(file=write(tmp_path, "optim:\nphase2:\n"))[0] == TrainConfig()


@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_in_both_phases(preset: str, phase: int) -> None:
    config, _ = resolve_config(preset, overrides={"run.phase": phase})
    assert (config.preset, config.run.phase) == (preset, phase)


def test_presets_hold_the_documented_settings() -> None:
    assert {path.stem for path in PRESET_DIR.iterdir()} == set(PRESETS)
    depth = {
        name: resolve_config(name)[0].retriever.model_dump(
            include={"num_instructions", "num_reasoning_steps", "num_stages"}
        )
        for name in ("webqsp", "cwq")
    }
    assert list(depth["webqsp"].values()) == [2, 2, 3]
    assert list(depth["cwq"].values()) == [3, 3, 2]
    for name, facts, batch in (("h200", 10, 1), ("b200", 15, 4)):
        config, _ = resolve_config(name)
        assert (config.sampler.k_facts, config.optim.batch_size_in(2)) == (facts, batch)
        assert config.generator_model == "unsloth/Nemotron-3-Nano-30B-A3B"
        assert resolve_config(name, overrides={"run.phase": 1})[0].optim.batch_size_in(1) == 16


def test_defaults_that_depend_on_other_settings() -> None:
    config = TrainConfig()
    assert config.optim.adapter_lr == pytest.approx(1e-5, rel=1e-12)
    assert resolve_config(overrides={"optim.lora_lr": 3e-6})[0].optim.adapter_lr == 3e-6
    assert [config.optim.epochs_in(phase) for phase in (1, 2)] == [10, 5]
    assert [config.optim.batch_size_in(phase) for phase in (1, 2)] == [16, 1]
    assert config.generator_model == "tiny"
    own = resolve_config(overrides={"data.heuristics_path": "x.jsonl"})[0]
    assert own.generator_model == "unsloth/Nemotron-3-Nano-30B-A3B"


def test_models_are_frozen_and_described() -> None:
    config = TrainConfig()
    with pytest.raises(ValidationError):
        config.optim.lr = 1.0
    with pytest.raises(ValidationError):
        SECTIONS["optim"](learning_rate=1.0)
    assert hash(config) == hash(TrainConfig())
    assert [key for key, info in FIELDS.items() if not info.description] == []


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("run.phase", "1", 1),
        ("run.resume", "true", True),
        ("run.resume", "runs/True", "runs/True"),
        ("run.compile", "none", None),
        ("run.compile", "False", False),
        ("optim.epochs", "null", None),
        ("optim.lr", "none", "none"),
        ("generator.lora_targets", "q_proj, v_proj", ("q_proj", "v_proj")),
        ("generator.model", "1", "1"),
        ("no.such", "true", "true"),
    ],
)
def test_text_from_the_command_line_is_typed_by_the_schema(
    key: str, text: str, value: object
) -> None:
    parsed = parse_text(key, text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_show_gives_every_key_once_with_its_origin() -> None:
    lines = show_config(*resolve_config("cwq")).splitlines()
    assert [line.split()[0] for line in lines] == list(FIELDS)
    by_key = {line.split()[0]: line.split(maxsplit=2)[1:] for line in lines}
    assert by_key["retriever.num_instructions"] == ["3", "preset cwq"]
    assert by_key["optim.lr"] == ["5e-05", "default"]


def test_schema_lists_every_section_and_key() -> None:
    schema = json.loads(config_schema())
    assert set(schema["properties"]) == {"preset", *SECTIONS}
    for name, model in SECTIONS.items():
        definition = schema["$defs"][model.__name__]
        assert set(definition["properties"]) == set(model.model_fields), name
        assert definition["additionalProperties"] is False


def test_the_module_is_a_command() -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dragkit.config", *words],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )

    shown = run("show", "--preset", "b200", "--k-facts", "12")
    assert shown.returncode == 0, shown.stderr
    assert ["sampler.k_facts", "12", "--k_facts"] in [
        line.split() for line in shown.stdout.splitlines()
    ]
    assert yaml.safe_load(run("schema").stdout)["title"] == "TrainConfig"
    wrong = run("shwo")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("dragkit: error: ")


@pytest.mark.parametrize("key", ["data.cache_dir", "run.checkpoint_dir", "generator.model"])
def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """No shell expands it in a file or behind a `=`. A folder named ~ would be made."""
    monkeypatch.setenv("HOME", "/home/me")
    section, _, name = key.partition(".")
    for written, expected in (("~/a", "/home/me/a"), ("a~/b", "a~/b"), ("~a", "~a")):
        assert (
            getattr(getattr(resolve_config(overrides={key: written})[0], section), name) == expected
        )
    assert resolve_config(overrides={"run.resume": "~/a"})[0].run.resume == "/home/me/a"
