"""What a file of questions lacks: counts in the log, and errors where nothing can be learned."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from dragkit.data.store import PackedStore
from dragkit.errors import DataError
from dragkit.generator.load import load_generator
from dragkit.retriever.text_encoder import TokenStates
from dragkit.trainer.remarks import (
    log_unread_texts,
    log_untaught_answers,
    require_answers,
    require_positive_facts,
)
from tests.trainer.run_cases import make_run

TRIPLES = [["a", "land.country.capital", "b"], ["a", "history.country.capital", "c"]]
GOOD = {"question": "q", "triples": TRIPLES, "topic_entities": "a", "answer": "b"}
LOST = GOOD | {"answer": "x"}
MUTE = {key: value for key, value in GOOD.items() if key != "answer"} | {"solution": "b"}


def packed(folder: Path, rows: list[dict]) -> PackedStore:
    path = folder / "some.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return PackedStore.build_or_open(path, cache_dir=folder)


def states(content: list[int], cut: list[bool]) -> TokenStates:
    none = np.zeros(0)
    return TokenStates(none, none, np.array(content), np.array(cut))


def test_cut_texts_and_shared_texts_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = packed(tmp_path, [GOOD, GOOD | {"question": "long " * 200}, GOOD, LOST])
    with caplog.at_level(logging.WARNING):
        log_unread_texts(
            store,
            states([1, 2, 1, 1], [False, True, False, True]),
            states([7, 8, 7, 9], [False, True, True, False]),
        )
    question, relation, shared = (
        r.getMessage() for r in caplog.records if r.name == "dragkit.trainer.remarks"
    )
    assert "2 of 4 questions" in question and "cut" in question and "line 2" in question
    assert len(question) < 300
    # Only the forward text counts, which is the first of two.
    assert "1 of 2 relations" in relation and "cut" in relation
    assert "2 of 2 relations share their text" in shared
    assert "land.country.capital" in shared and "history.country.capital" in shared
    caplog.clear()
    log_unread_texts(store, states([1] * 4, [False] * 4), states([7, 7, 8, 7], [False] * 4))
    assert not caplog.records


def test_nothing_to_learn_in_phase_1_is_refused_with_the_reason(tmp_path: Path) -> None:
    store = packed(tmp_path, [LOST, LOST, MUTE])
    with pytest.raises(DataError) as error:
        require_positive_facts(store, None, None)
    for words in (
        "some.jsonl",
        "none of the 3 questions",
        "2 with no answer among",
        "'x'",
        "solution",
    ):
        assert words in str(error.value)
    store = packed(tmp_path, [LOST, GOOD, LOST])
    require_positive_facts(store, None, None)
    require_positive_facts(store, None, np.array([1, 2]))
    with pytest.raises(DataError, match="none of the 2 questions"):
        require_positive_facts(store, None, np.array([0, 2]))
    with pytest.raises(DataError, match="none of the 3 questions"):
        require_positive_facts(store, np.zeros_like(store.labels), None)


def test_nothing_to_learn_in_phase_2_is_refused_with_the_keys(tmp_path: Path) -> None:
    store = packed(tmp_path, [MUTE, MUTE | {"answer": [""]}])
    with pytest.raises(DataError) as error:
        require_answers(store, None)
    for words in ("some.jsonl", "none of the 2 questions", "answer", "`solution` (2 questions)"):
        assert words in str(error.value)
    store = packed(tmp_path, [MUTE, LOST])
    require_answers(store, None)
    with pytest.raises(DataError, match="none of the 1 questions"):
        require_answers(store, np.array([0]))


def test_answers_that_are_not_taught_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = packed(tmp_path, [GOOD | {"answer": list("bcdefg"[:n])} for n in (2, 5, 3, 6)])
    said = []
    for rows, limit in ((None, 6), (np.array([0, 2]), 3), (None, 3), (np.array([0, 1, 2]), 2)):
        caplog.clear()
        log_untaught_answers(store, rows, limit)
        said.append([record.getMessage() for record in caplog.records])
    assert said[:2] == [[], []]
    ((every,), (some,)) = said[2:]
    assert "2 of 4 questions" in every and "max_answers = 3" in every
    assert "5 answers are not taught. Line 4 has 6" in every
    assert "2 of 3 questions" in some and "4 answers are not taught. Line 2 has 5" in some


def test_training_says_how_many_answers_it_does_not_teach(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path, 2, **{"generator.max_answers": 1})
    generator = load_generator(run.config.generator, torch.device("cpu"), name="tiny")
    for training, times in ((False, 0), (True, 1)):
        caplog.clear()
        run.inputs.dataset(run.paths.train, generator, 3, training=training)
        assert caplog.text.count("2 of 8 questions have more than generator.max_answers") == times
