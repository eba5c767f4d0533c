"""What a file lacks to learn from: reasons, examples, and keys that are not read."""

from __future__ import annotations

import itertools
import json
import logging
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from dragkit.data.gaps import describe_unread, folded
from dragkit.data.question_row import near_field
from dragkit.data.store import PackedStore

TRIPLES = [["Norvia", "capital", "Tellum"], ["Estrad", "twin", "Thé Lun"]]
GOOD = {"question": "q", "triples": TRIPLES, "topic_entities": "Norvia", "answer": "Tellum"}
NFD = unicodedata.normalize("NFD", "Thé Lun")
ROWS = {
    "no_fact": GOOD | {"triples": []},
    "no_answer": GOOD | {"answer": []},
    "other_form": GOOD | {"answer": ["Elsewhere", NFD]},
    "not_in_graph": GOOD | {"answer": "Tellun"},
    "topic_not_in_graph": GOOD | {"topic_entities": "Norway"},
    "no_path": GOOD | {"answer": "Estrad"},
}

Open = Callable[[list[dict]], PackedStore]


@pytest.fixture
def opened(write_rows: Callable[..., Path], tmp_path: Path) -> Open:
    return lambda rows: PackedStore.build_or_open(write_rows(rows), cache_dir=tmp_path)


def test_every_question_without_a_positive_fact_has_one_reason(opened: Open) -> None:
    reasons = list(ROWS)
    rows = [[ROWS[reason]] * (n + 1) for n, reason in enumerate(reasons)]
    store = opened([GOOD, *itertools.chain(*rows)])
    assert store.label_gaps.counts == {reason: n + 1 for n, reason in enumerate(reasons)}
    assert store.summary["labels_none"] == 21
    # Examples are of the first question of a reason.
    lines = [int(store.label_gaps.examples[reason].split()[1].rstrip(":")) for reason in reasons]
    assert lines == [2, 3, 5, 8, 12, 17]
    assert ascii(NFD) in str(store.label_gaps) and "'Thé Lun'" in str(store.label_gaps)
    assert "answer 'Tellun', entities such as 'Tellum'" in str(store.label_gaps)


@pytest.mark.parametrize(
    ("answer", "is_a_form"),
    [
        *(("tellum", True), ("TELLUM ", True), (NFD, True), ("The Lun", False), ("Tellum.", False)),
        *(("Ｔｅｌｌｕｍ", True), ("Thé\u00a0Lun", True), ("thé  lun", True), ("m.0t", False)),
    ],
)
def test_another_form_of_an_entity_is_known_as_such(
    opened: Open, answer: str, is_a_form: bool
) -> None:
    counts = opened([GOOD | {"answer": answer}]).label_gaps.counts
    assert counts == {"other_form" if is_a_form else "not_in_graph": 1}
    assert is_a_form == any(folded(answer) == folded(name) for name in ("Tellum", "Thé Lun"))


def test_ids_against_names_are_shown_side_by_side(opened: Open) -> None:
    row = GOOD | {"triples": [["m.0n", "capital", "m.0t"]], "topic_entities": "m.0n"}
    assert "answer 'Tellum', entities such as 'm.0n', 'm.0t'" in str(opened([row]).label_gaps)


def test_counts_are_logged_on_every_opening(opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    rows = [GOOD] * 6 + [GOOD | {"answer": "Elsewhere"}] * 17 + [GOOD | {"answer": None}]
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            opened(rows)
        assert "18 of 24 questions have no positive fact" in caplog.text
        assert "17 with no answer among the entities of the graph (line 7:" in caplog.text
        assert "1 of 24 questions have no answer" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        opened([GOOD])
    assert not caplog.records


@pytest.mark.parametrize(
    ("key", "field"),
    [
        *(("Answer", "answer"), ("ANSWERS", "answers"), ("a_entity", "answer")),
        *(("q_entity", "topic_entities"), ("topicEntities", "topic_entities"), ("QID", "id")),
        *(("topic-entities", "topic_entities"), ("graph", "triples"), ("answr", "answer")),
        *(("Relation Paths", "relation_paths"), ("", None)),
        *(
            ("hops", None),
            ("dataset", None),
            ("answers_in_subgraph", None),
            ("é", None),
            ("", None),
        ),
    ],
)
def test_keys_near_a_field(key: str, field: str | None) -> None:
    assert near_field(key) == field


def test_a_key_counts_only_where_its_field_is_lacking(opened: Open, caplog) -> None:
    lacking = {k: v for k, v in GOOD.items() if k not in ("answer", "topic_entities")}
    rows = [
        GOOD | {"a_entity": ["x"], "Answer": "x", "hops": 1},
        lacking | {"Answer": "Tellum", "q_entity": "Norvia", "hops": 1},
        lacking | {"Answer": "Tellum", "q_entity": "Norvia", "answers": ["Tellum"]},
        lacking | {"Answer": None, "answers": []},
    ]
    with caplog.at_level(logging.WARNING):
        store = opened(rows)
    counts = {(key, field): count for key, field, count in store.unread}
    assert counts == {("Answer", "answer"): 2, ("q_entity", "topic_entities"): 2, ("hops", ""): 1}
    (line,) = [r.getMessage() for r in caplog.records if "keys that are not read" in r.getMessage()]
    assert "`Answer` for `answer` (2 questions)" in line and "hops" not in line
    assert "`hops` (1 questions)" in describe_unread(store.unread, all_keys=True)


def test_generated_keys_do_not_fill_the_memory(opened: Open) -> None:
    rows = [{k: v for k, v in GOOD.items() if k != "answer"} | {f"k{n}": 1} for n in range(1500)]
    assert len(opened(rows).unread) == 1000


def test_what_a_file_lacks_is_said_each_time_it_is_opened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The cache holds the packed file, so the second time no row is read."""
    rows = [
        {"question": "q", "triples": [["a", "r", "b"]], "answer": "b", "answers": ["b", "c"]},
        {"question": "q", "triples": [["a", "r", "b"]], "answer": "b", "answers": ["b"]},
        {"question": "q", "triples": [["a", "r", "b"]], "answer": [], "answers": ["b"]},
        {"question": " ", "triples": [["a", "", "b"], ["a", "r", "  "], ["a", "r", "b"]]},
        {"question": "q", "triples": [["a", "r", "b"]], "paths": [["a", "b"]], "answer": "b"},
    ]
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):
        caplog.clear()
        PackedStore.build_or_open(path, cache_dir=tmp_path)
        for said in (
            "some.jsonl: 1 of 5 questions have other answers under `answers`",
            "some.jsonl: 1 of 5 questions are empty",
            "some.jsonl: 2 of 7 facts have an empty entity or an empty relation",
            "some.jsonl: 1 of 5 questions name no topic entity",
            "some.jsonl: 1 of 5 questions have no answer",
        ):
            assert said in caplog.text
