"""Evaluation with gold facts: what the prompts hold, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from dragkit import evaluate as evaluate_command
from dragkit import load_run
from dragkit.data.store import PackedStore
from dragkit.errors import ConfigError
from tests.trainer.run_cases import FIXTURE, make_run


def facts_of(prediction: dict) -> set[tuple[str, ...]]:
    return {tuple(fact["triple"]) for fact in prediction["facts"]}


def test_prompts_hold_the_positive_facts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    make_run(tmp_path, 2, **{"optim.epochs": 1}).execute()
    store = PackedStore.build_or_open(FIXTURE, cache_dir=tmp_path)
    run = load_run(tmp_path / "run", device="cpu")
    retrieved = run.evaluate(FIXTURE)
    with caplog.at_level(logging.INFO):
        gold = run.evaluate(FIXTURE, facts="gold")
    differs = 0
    for row, (before, after) in enumerate(
        zip(retrieved.predictions, gold.predictions, strict=True)
    ):
        question = store.question(row)
        pairs = zip(question.triples, question.labels, strict=True)
        positive = {triple for triple, label in pairs if label}
        assert facts_of(after) == (positive or facts_of(before))
        differs += facts_of(after) != facts_of(before)
    assert differs > 2
    assert "1 of 8 questions have none and keep their retrieved facts" in caplog.text
    means = gold.report.means
    assert means["retrieval-precision"] == means["retrieval-recall"] == 1.0
    # Rankings stay those of the retriever.
    for name in ("retrieval-average-precision", "answer-recall@5"):
        assert means[name] == retrieved.report.means[name]
    assert run.evaluate(FIXTURE).predictions == retrieved.predictions
    with pytest.raises(ValueError, match='"retrieved" or "gold", got \'golden\''):
        run.evaluate(FIXTURE, facts="golden")  # type: ignore[arg-type]

    out = tmp_path / "ceiling.json"
    arguments = [str(tmp_path / "run"), "--facts", "gold", "--data", str(FIXTURE)]
    # The second evaluation replaces the first one's file, and no other.
    for file, code in ((out, 0), (out, 0), (FIXTURE, 73)):
        words = [*arguments, "--output", str(file), "--device", "cpu"]
        assert evaluate_command.main(words) == code
    document = json.loads(out.read_text())
    assert document["facts"] == "gold"
    assert document["files"][str(FIXTURE)]["predictions"] == gold.predictions


def test_a_retriever_alone_has_no_prompts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_run(tmp_path, 1, **{"optim.epochs": 1}).execute()
    arguments = [str(tmp_path / "run"), "--facts", "gold", "--data", str(FIXTURE)]
    assert evaluate_command.main(arguments) == ConfigError.exit_code
    assert "generates no answers" in capsys.readouterr().err
