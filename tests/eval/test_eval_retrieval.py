"""Retrieval metrics of a question: which are defined, and their values by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dragkit.data.store import StoredQuestion
from dragkit.eval.evaluate import _retrieval_scores
from dragkit.eval.types import Prediction

QUESTION = StoredQuestion(
    id="q",
    text="?",
    topics=("a",),
    answers=(),
    line=1,
    entities=("a", "b"),
    triples=tuple(("a", f"r{i}", "b") for i in range(4)),
    labels=(1, 0, 0, 1),
    topic_nodes=(0,),
    evidence=None,
    relation_path_facts=None,
)
# Ranks: fact 2, 0, 3, 1. The first two are in the prompt.
PREDICTION = Prediction(
    row=0, ranked=(2, 0, 3, 1), selected=(2, 0), probability=(0.9, 0.8, 0.4, 0.1), text=None
)


def scores_of(family: str, **fields: object) -> dict[str, float]:
    scores = _retrieval_scores(replace(QUESTION, **fields), PREDICTION)
    return {
        name.removeprefix(f"{family}-"): value
        for name, value in scores.items()
        if name.startswith(f"{family}-")
    }


@pytest.mark.parametrize(
    ("family", "field"), [("evidence", "evidence"), ("relation-path", "relation_path_facts")]
)
def test_judgements_of_others(family: str, field: str) -> None:
    assert scores_of(family, **{field: (2, 1)}) == {
        "precision": 1 / 2,
        "recall": 1 / 2,
        # Ranks 1 and 4.
        "average-precision": pytest.approx((1 + 2 / 4) / 2),
    }
    assert scores_of(family, **{field: (3,)}) == {
        "precision": 0.0,
        "recall": 0.0,
        "average-precision": pytest.approx(1 / 3),
    }
    # A judgement without a fact of the graph: each chosen fact is wrong, and no recall is defined.
    assert scores_of(family, **{field: ()}) == {"precision": 0.0}
    assert scores_of(family, **{field: None}) == {}


def test_labels() -> None:
    assert scores_of("retrieval") == {
        "precision": 1 / 2,
        "recall": 1 / 2,
        "f1": 1 / 2,
        "average-precision": pytest.approx((1 / 2 + 2 / 3) / 2),
    }
    assert scores_of("retrieval", labels=(0, 0, 0, 0), evidence=(1,)) == {}


def test_a_question_without_facts_has_no_judged_prompt() -> None:
    question = replace(QUESTION, triples=(), labels=(), evidence=(), relation_path_facts=())
    prediction = Prediction(row=0, ranked=(), selected=(), probability=(), text=None)
    assert _retrieval_scores(question, prediction) == {"facts-selected": 0.0}
