"""The self-test's checks of question files hold, and see a fault in each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from dragkit.data import store
from dragkit.data.store import PackedStore, StoredQuestion
from dragkit.selftest import data_cases
from dragkit.selftest.data_cases import (
    builders,
    cache_keys,
    compressed_files,
    large_files,
    names_kept,
    shortest_labels,
)
from dragkit.selftest.numbers.content import large_graph, odd_content, order_of_facts
from dragkit.selftest.numbers.small_joint import SmallJoint
from dragkit.selftest.outcome import Outcome


def run(check: Callable[..., None], *arguments: object, **options: object) -> Outcome:
    outcome = Outcome("x")
    check(outcome, *arguments, **options)
    return outcome


def test_nothing_is_lost_without_a_fault(tmp_path: Path) -> None:
    for check, options, tried in (
        (names_kept, {}, 20),
        (compressed_files, {}, 25),
        (shortest_labels, {"count": 50}, 51),
        (cache_keys, {"count": 3}, 30),
        (large_files, {"num_facts": 1000, "num_questions": 50}, 5),
        (odd_content, {}, 15),
        (order_of_facts, {"count": 4}, 12),
    ):
        outcome = run(check, tmp_path, **options)
        assert outcome.losses == [] and outcome.tried >= tried, check
    assert run(large_graph, num_facts=10**5).losses == []


def read_as(change: Callable[[StoredQuestion], StoredQuestion]) -> mock._patch:
    """Changes every question that is read from a store."""
    original = PackedStore.question
    return mock.patch.object(PackedStore, "question", lambda s, row: change(original(s, row)))


def test_names_that_are_normalised_or_printed_raw_are_seen(tmp_path: Path) -> None:
    with read_as(lambda question: replace(question, text=question.text.strip())):
        assert [x.partition(":")[0] for x in run(names_kept, tmp_path).losses] == ["spaces"]
    with mock.patch.object(data_cases, "printable", lambda text: text):
        assert len(run(names_kept, tmp_path).losses) == 2


def test_labels_by_position_are_seen(tmp_path: Path) -> None:
    def shifted(question: StoredQuestion) -> StoredQuestion:
        return replace(question, labels=tuple(np.roll(question.labels, 1).tolist()))

    with read_as(shifted):
        losses = run(shortest_labels, tmp_path, count=50).losses
    assert 10 < len(losses) <= 50


def test_a_cache_that_ignores_content_or_options_is_seen(tmp_path: Path) -> None:
    key = store.cache_key
    for known, lost in ((1, ["row", "row"]), (2, ["label_rule", "max_bad_fraction", "merge"])):
        folder = tmp_path / str(known)
        folder.mkdir()
        with mock.patch.object(store, "cache_key", lambda *parts, n=known: key(*parts[:n])):
            losses = run(cache_keys, folder, count=2).losses
        assert [x.split()[0].rstrip(":") for x in losses if "same key" in x][: len(lost)] == lost


def test_a_reader_of_cut_files_is_seen(tmp_path: Path) -> None:
    def accept(path: Path, **options: object) -> list:
        return [None] * 50

    with mock.patch.object(data_cases.PackedStore, "build_or_open", accept):
        outcome = run(compressed_files, tmp_path)
    assert len(outcome.losses) == outcome.tried - 1


def test_scores_that_depend_on_the_order_are_seen(tmp_path: Path) -> None:
    original, calls = SmallJoint.batch, []

    def noisy(self: SmallJoint, rows: range) -> object:
        calls.append(rows)
        for parameter in self.phase.model.retriever.parameters():
            parameter.data *= 1 + 1e-2 * len(calls)
        return original(self, rows)

    with mock.patch.object(SmallJoint, "batch", noisy):
        assert len(run(order_of_facts, tmp_path, count=2).losses) == 6


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_builders_leave_nothing_half(tmp_path: Path) -> None:
    outcome = run(builders, tmp_path, count=2)
    assert outcome.losses == [] and outcome.tried == 3
