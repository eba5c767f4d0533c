"""Experiment files: what each run gets, what is shared, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dragkit.config.arguments import parse_train_args
from dragkit.errors import ConfigError, MissingInputError
from dragkit.experiment.plan import expand, read_experiment
from tests.experiment.cases import FIXTURE, TEXT, read_text


@pytest.fixture(autouse=True)
def _questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUESTIONS", str(FIXTURE))


def test_arms_share_phase_1_by_its_settings(tmp_path: Path) -> None:
    experiment = read_text(TEXT, tmp_path)
    runs = experiment.runs
    assert len(runs) == 2 * 2 * (2 + 4)
    # Every phase 1 stands before what needs it.
    assert all(run.first is None or runs.index(run.first) < runs.index(run) for run in runs)
    assert len({run.folder for run in runs}) == len(runs)
    first = {
        run.arm: run.first.folder
        for run in runs
        if (run.data, run.seed) == ("eight", 1) and run.first is not None
    }
    shared, own = Path("eight/seed-1/phase1"), Path("eight/seed-1/phase1-paths")
    assert first == {"none": shared, "both": shared, "paths": own, "again": own}


def test_the_layers_of_settings(tmp_path: Path) -> None:
    runs = {str(run.folder): run.config for run in read_text(TEXT, tmp_path).runs}
    first, none = runs["eight/seed-1/phase1"], runs["eight/seed-1/arm-none"]
    assert (first.run.phase, none.run.phase, none.run.seed) == (1, 2, 1)
    # `settings` and a data set reach both phases, their blocks only one of them.
    assert (first.optim.batch_size, none.optim.batch_size) == (8, 4)
    assert (first.optim.lr, none.optim.lr) == (1e-3, 1e-3)
    assert first.optim.epochs == 4 and none.optim.epochs != 4
    assert runs["demo/seed-0/phase1"].optim.epochs != 4
    assert first.data.test_heuristics_path == none.data.test_heuristics_path == str(FIXTURE)
    # An arm is of phase 2. Its block is of its phase 1 alone.
    assert (none.generator.structural_vectors, first.generator.structural_vectors) == (False, True)
    rules = {
        name: runs[f"eight/seed-0/{name}"].data.label_rule
        for name in ("arm-both", "arm-paths", "arm-again", "phase1", "phase1-paths")
    }
    assert rules == {
        **{"arm-both": "auto", "arm-paths": "paths", "arm-again": "auto"},
        **{"phase1": "auto", "phase1-paths": "paths"},
    }
    assert not none.run.test_before_training


UGLY = """\
name: ugly
seeds: [7]
data: {one: {heuristics_path: "${DIR}/a b,=$x.jsonl", test_heuristics_path: "${DIR}/a b,=$x.jsonl"}}
settings:
  preset: webqsp
  generator: {model: tiny, lora_targets: [q_proj, out_proj], max_tokens_per_microbatch: null}
  optim.warmup_share: 0.25
  run.compile: false
arms: {a: {optim.lr: 2.5e-5, sampler.mode: exact_k, loss.use_grad_norm_balance: true}}
metrics: [strict-f1]
"""


@pytest.mark.parametrize("text", [TEXT, UGLY])
def test_a_command_resolves_to_the_configuration_of_its_run(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIR", str(tmp_path))
    (tmp_path / "a b,=$x.jsonl").touch()
    runs = read_text(text, tmp_path).runs
    for run in runs:
        assert parse_train_args([expand(word) for word in run.arguments]).config == run.config
    if text == UGLY:
        assert runs[-1].config.generator.lora_targets == ("q_proj", "out_proj")
        assert runs[-1].config.optim.warmup_ratio == 0.25
        assert any("${DIR}/a b" in word for word in runs[-1].arguments)


def test_all_mistakes_are_reported_at_once_with_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    text = """\
name: wrong
sedes: [0]
seeds: [0, 1]
data:
  unset: {heuristics_path: "${NOWHERE}/x", test_heuristics_path: "${NOWHERE}/x"}
  gone: {heuristics_path: /no/such.jsonl, test_heuristics_path: /no/such.jsonl}
  untested: {heuristics_path: "${QUESTIONS}"}
settings: {optim.lrr: 1, run.seed: 3, phase2: {optim.lr: fast}}
arms:
  a: {retriever.hidden_dim: 32}
  b: {phase1: {retriever.hiden_dim: 32}}
metrics: [strict-f1]
"""
    with pytest.raises(ConfigError) as caught:
        read_text(text, tmp_path)
    lines = str(caught.value).splitlines()
    for part in (
        "sedes: unknown key; the keys of an experiment are name,",
        "data.heuristics_path (data.unset): the variable NOWHERE is not set",
        "optim.lrr (settings): unknown key; did you mean optim.lr?",
        "run.seed (settings): is set by the experiment. Omit it.",
        "optim.lr (settings.phase2): must be a valid number",
        "retriever.hiden_dim (arms.b.phase1): unknown key",
        "data.heuristics_path (data.gone): /no/such.jsonl: no such file",
        "data.test_heuristics_path (data.untested): is missing",
    ):
        assert sum(part in line for line in lines) == 1, part
    # Both variables and both files of a set are named.
    assert "small.yaml: 10 problems" in lines[0] and len(lines) == 11


def test_an_arm_may_not_change_the_retriever_of_phase_2_alone(tmp_path: Path) -> None:
    arms = "  narrow: {retriever.hidden_dim: 32}\n"
    arms += "  wide: {retriever.hidden_dim: 128, phase1: {retriever.hidden_dim: 128}}\n"
    with pytest.raises(ConfigError) as caught:
        read_text(TEXT.replace("  both:\n", arms), tmp_path)
    assert "retriever.hidden_dim (arms.narrow): differs from phase 1" in str(caught.value)
    assert ": 1 problem in" in str(caught.value)
    runs = read_text(TEXT.replace("  both:\n", arms.splitlines()[1] + "\n"), tmp_path).runs
    (run,) = [r for r in runs if r.arm == "wide" and (r.data, r.seed) == ("eight", 0)]
    assert run.first is not None and run.first.folder.name == "phase1-wide"
    assert run.config.retriever.hidden_dim == run.first.config.retriever.hidden_dim == 128


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("seeds: [0, 1]", "seeds: [0, 0]", "seeds: an item is given twice"),
        ("seeds: [0, 1]", "seeds: []", "seeds: "),
        ("seeds: [0, 1]", "seeds: [-1]", "seeds.0: must be greater"),
        ("seeds: [0, 1]", "", "seeds: Field required"),
        ("baseline: none", "baseline: static", "baseline: must be one of the arms none, both"),
        ("  both:", "  both: 3", "arms.both: must be a valid dictionary (got 3)"),
        ("  both:", "  no/folder:", "arms.no/folder: String should match"),
        ("  both:", "  yes:", "arms.1: must be a valid string (got True)"),
        ("  both:", "  none:", "'none' is given twice"),
        ("name: small", "name: ../up", "name: String should match"),
        ("  phase1: {optim.batch_size: 8}", "  phase1: 8", "phase1 (settings): unknown key"),
    ],
)
def test_a_wrong_form_is_refused(old: str, new: str, part: str, tmp_path: Path) -> None:
    assert old in TEXT
    with pytest.raises(ConfigError) as caught:
        read_text(TEXT.replace(old, new, 1), tmp_path)
    assert part in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"no\.yaml: no such file"):
        read_experiment(tmp_path / "no.yaml")
