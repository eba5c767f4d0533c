"""Means, denominators, table and JSON values of a report."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dragkit.eval import METRIC_VERSION, QuestionRecord, aggregate, score_text


def four_records() -> list[QuestionRecord]:
    """Scores four questions: right, half right, without output, without gold answer."""
    return [
        score_text("a", "Oslo", ["Oslo"], answer_in_graph=True, retrieval={"retrieval-f1": 0.5}),
        score_text("b", "Oslo | Rome", ["Rome"], answer_in_graph=True, num_left_out=4),
        score_text("c", "", ["Lima"], answer_in_graph=False, retrieval={"retrieval-f1": 1.0}),
        score_text("d", "Lima", [], answer_in_graph=False, num_left_out=1),
    ]


def test_means_and_denominators_by_hand() -> None:
    report = aggregate(four_records())
    assert report.counts == {
        "asked": 4,
        "answerable_in_subgraph": 2,
        "no_gold": 1,
        "scored": 4,
        "empty_predictions": 1,
        "facts_left_out": 5,
        "prompts_cut": 2,
    }
    assert report.means["strict-hits@1"] == 1 / 4
    assert report.means["strict-hit"] == 2 / 4
    assert report.means["strict-f1"] == pytest.approx((1 + 2 / 3) / 4)
    assert report.means["rog-hit"] == 2 / 4
    assert report.means["retrieval-f1"] == 0.75
    assert report.families() == {"strict": 4, "rog": 4, "subgraphrag": 4, "retrieval": 2}


def test_every_metric_names_its_family() -> None:
    families = ("strict-", "rog-", "subgraphrag-", "rearev-", "retrieval-")
    assert all(name.startswith(families) for name in aggregate(four_records()).means)


def test_json_round_trip() -> None:
    report = aggregate(four_records())
    loaded = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert loaded == report.to_dict()
    assert loaded["schema_version"] == 1
    assert loaded["metric_version"] == METRIC_VERSION
    assert loaded["metrics"]["retrieval-f1"] == {"mean": 0.75, "scored": 2}


def test_unknown_answerability_is_none() -> None:
    rows = [*four_records(), score_text("e", "x", ["x"])]
    report = aggregate(rows)
    assert report.counts["answerable_in_subgraph"] is None
    assert "unknown" in report.to_table()


def test_table_is_aligned_and_complete() -> None:
    report = aggregate(four_records())
    metrics, counts = (part.splitlines() for part in report.to_table().strip().split("\n\n"))
    assert len({len(line) for line in metrics}) == 1
    assert len({len(line) for line in counts}) == 1
    cells = {line.split()[0]: line.split()[1:] for line in metrics + counts}
    assert cells["strict-f1"] == ["41.67", "4"]
    assert cells["retrieval-f1"] == ["75.00", "2"]
    assert cells["empty_predictions"] == ["1"]
    assert set(cells) == {"metric", *report.means, *report.counts}


def test_without_generation_no_prediction_is_empty() -> None:
    record = score_text("a", None, ["Oslo"], answer_in_graph=True, retrieval={"retrieval-f1": 1.0})
    assert aggregate([record]).counts["empty_predictions"] == 0


def test_without_questions_there_are_counts_and_no_means() -> None:
    report = aggregate([])
    assert report.means == {}
    assert report.counts["asked"] == report.counts["scored"] == 0
    assert "NaN" not in json.dumps(report.to_dict(), allow_nan=False)
    assert "asked" in report.to_table()


@pytest.mark.parametrize(
    ("scores", "retrieval", "message"),
    [
        ({"strict-f1": 1.0}, {}, "'q'.*rog-accuracy"),
        ({"strict-f1": math.nan}, {}, "'q': strict-f1"),
        ({"strict-f1": math.inf}, {}, "'q': strict-f1"),
        ({"strict-f1": 1.0}, {"strict-f1": 1.0}, "answer and retrieval"),
    ],
)
def test_inconsistent_records_are_refused(
    scores: dict[str, float], retrieval: dict[str, float], message: str
) -> None:
    row = QuestionRecord("q", scores, num_golds=1, num_predictions=1, retrieval=retrieval)
    before = four_records() if "accuracy" in message else []
    with pytest.raises(ValueError, match=message):
        aggregate([*before, row])


OUTPUTS = st.sampled_from(["", "|", "Oslo", "Oslo | Rome", "none", "\n", "The"])
GOLDS = st.lists(st.sampled_from(["Oslo", "Rome", "The", "!!!"]), max_size=3)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(OUTPUTS, GOLDS), min_size=1, max_size=8))
def test_every_question_asked_is_scored(rows: list[tuple[str, list[str]]]) -> None:
    records = [score_text(str(index), *row) for index, row in enumerate(rows)]
    report = aggregate(records)
    assert report.counts["asked"] == report.counts["scored"] == len(rows)
    assert set(report.num_scored.values()) == {len(rows)}
    assert report.counts["no_gold"] == sum(not golds for _, golds in rows)
    # Wrong answers are part of the denominator.
    expected = sum(record.scores["rog-f1"] for record in records) / len(rows)
    assert report.means["rog-f1"] == pytest.approx(expected)
    assert aggregate(records[::-1]).means == report.means
