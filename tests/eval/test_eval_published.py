"""The rog scores against predictions and results released by GNN-RAG. Needs those files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from dragkit.eval import QuestionRecord, aggregate, parse_answers, rog_scores, score_text

VARIABLE = "DRAGKIT_GNNRAG_PREDICTIONS"
# Key in the rows, name in the result file, and metric.
NAMES = {
    ("acc", "Accuracy"): "rog-accuracy",
    ("hit", "Hit"): "rog-hit",
    ("hit1", "Hit1"): "rog-hits@1",
    ("f1", "F1"): "rog-f1",
    ("precission", "Precision"): "rog-precision",
    ("recall", "Recall"): "rog-recall",
}


@pytest.fixture(scope="module")
def released() -> tuple[Path, list[dict]]:
    """Path and rows of `predictions.jsonl` or `detailed_eval_result.jsonl`."""
    if not os.environ.get(VARIABLE):
        pytest.skip(f"{VARIABLE} does not point to a released predictions file of GNN-RAG")
    path = Path(os.environ[VARIABLE])
    return path, [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def output_of(row: dict) -> str:
    """Returns the output as text. The detailed file holds a list of lines."""
    prediction = row["prediction"]
    return prediction if isinstance(prediction, str) else "\n".join(prediction)


def test_rows_match_where_the_file_has_their_scores(released: tuple[Path, list[dict]]) -> None:
    _, rows = released
    if "f1" not in rows[0]:
        pytest.skip("this file holds no score for each question")
    for row in rows:
        scores = rog_scores(output_of(row), row["ground_truth"])
        published = {name: row[key] for (key, _), name in NAMES.items()}
        assert scores == pytest.approx(published, abs=1e-12), row["id"]


@pytest.mark.parametrize("through_parser", [False, True])
def test_means_match_the_published_result(
    released: tuple[Path, list[dict]], through_parser: bool
) -> None:
    path, rows = released
    result = path.with_name("eval_result.txt")
    if not result.exists():
        pytest.skip("the folder of the predictions has no eval_result.txt")
    texts = [output_of(row).strip() for row in rows]
    if through_parser and any(
        len(parse_answers(text, keep_repeats=True)) != len(text.split("\n")) for text in texts
    ):
        pytest.skip("free text: the published evaluator counts blank lines, the parser does not")
    records = []
    for row in rows:
        record = score_text(row["id"], output_of(row), row["ground_truth"])
        if not through_parser:
            scores = rog_scores(output_of(row), row["ground_truth"])
            record = QuestionRecord(row["id"], scores, record.num_golds, record.num_predictions)
        records.append(record)
    report = aggregate(records)
    found = re.findall(r"(\w+): ([\d.]+)", result.read_text("utf-8"))
    means = {title: report.means[name] * 100 for (_, title), name in NAMES.items()}
    assert {title: float(percent) for title, percent in found} == pytest.approx(means, abs=1e-9)
