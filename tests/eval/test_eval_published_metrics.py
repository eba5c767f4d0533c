"""Scores of single questions computed by hand for every family, including published faults."""

from __future__ import annotations

import pytest

from dragkit.eval import (
    rearev_scores,
    rog_scores,
    score_question,
    subgraphrag_scores,
)
from dragkit.selftest import metric_table
from dragkit.selftest.metric_table import CASES, REAREV_CASES, wrong_rearev_scores, wrong_scores
from dragkit.selftest.outcome import Outcome


@pytest.mark.parametrize("name", CASES)
def test_hand_computed_case(name: str) -> None:
    assert wrong_scores(name) == {}


def test_published_evaluators_count_some_empty_texts_as_right() -> None:
    assert rog_scores("", ["The"])["rog-hit"] == 1.0
    assert subgraphrag_scores("", ["Paris"], "where is it")["subgraphrag-hit"] == 1.0
    assert subgraphrag_scores("", ["Paris"], "which city")["subgraphrag-hit"] == 0.0
    assert not any(score_question([], ["The"], question="where is it").values())


def test_subgraphrag_hit_reads_the_whole_text_without_a_mark() -> None:
    scores = subgraphrag_scores("It is Paris", ["Paris"])
    assert scores["subgraphrag-hit"] == 1.0
    assert scores["subgraphrag-hits@1"] == scores["subgraphrag-f1"] == 0.0
    marked = subgraphrag_scores("It may be Paris\nans: Rome", ["Paris"])
    assert not any(marked.values())


def test_the_lenient_rule_reads_what_follows_the_last_mark() -> None:
    scores = subgraphrag_scores("ans: x ans: Lond", ["London"], "where")
    assert scores["subgraphrag-hits@1"] == scores["subgraphrag-f1"] == 1.0


def test_only_inner_blank_lines_lower_the_rog_precision() -> None:
    assert rog_scores("\n\nOslo\n", ["Oslo"])["rog-precision"] == 1.0
    assert rog_scores("Oslo\n\nRome", ["Oslo"])["rog-precision"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("predictions, golds", [("Paris", ["Paris"]), (["Paris"], "Paris")])
def test_a_text_instead_of_a_list_is_refused(predictions: object, golds: object) -> None:
    with pytest.raises(ValueError, match="must be a list of answers"):
        score_question(predictions, golds)


@pytest.mark.parametrize("name", REAREV_CASES)
def test_rearev_case(name: str) -> None:
    assert wrong_rearev_scores(name) == {}


def test_rearev_collects_until_the_mass_is_exceeded_and_sizes_must_agree() -> None:
    assert rearev_scores(["a", "b"], [0.5, 0.5], ["a"], mass=0.5)["rearev-precision"] == 0.5
    with pytest.raises(ValueError, match="2 entities but 1 probabilities"):
        rearev_scores([0, 1], [1.0], [0])


def test_a_wrong_score_and_a_missing_one_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    score = metric_table.rearev_scores

    def wrong(*args: object, **options: object) -> dict[str, float]:
        scores = score(*args, **options)
        return scores | {"rearev-em": 1.0, "rearev-other": 0.0}

    monkeypatch.setattr(metric_table, "rearev_scores", wrong)
    found = wrong_rearev_scores("gold second")
    assert found == {"rearev-other": (0.0, -1.0)}
    assert wrong_rearev_scores("gold after the mass")["rearev-em"] == (1.0, 0.0)
    outcome = Outcome("x")
    metric_table.metric_table(outcome)
    assert outcome.tried == len(CASES) + len(REAREV_CASES)
    assert len(outcome.losses) == len(REAREV_CASES)
