"""Splits by group: no leak, the stated shares, the same everywhere."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dragkit.data.build.source_question import SourceQuestion
from dragkit.data.build.splits import group_of, split_of
from dragkit.data.question_file import Question
from dragkit.errors import ConfigError

RECORDED = ["test", "train", "train", "test", "test"]
RECORDED_1 = ["train", "train", "dev", "train", "train"]
FRACTIONS = {"train": 0.7, "dev": 0.1, "test": 0.2}


def _question(text: str, group: str | None = None) -> SourceQuestion:
    return SourceQuestion(Question("q", text, (), (), (), (), 1), None, group)


def test_the_split_of_a_group_is_the_same_on_every_machine() -> None:
    # Written down once. Any change of the hash would move questions from test to train.
    groups = ["", "a", "WebQTrn-1", "é", "\udc80"]
    assert [split_of(group, FRACTIONS) for group in groups] == RECORDED
    assert [split_of(group, FRACTIONS, 1) for group in groups] == RECORDED_1


@given(st.integers(0, 2**40), st.lists(st.floats(0.01, 1), min_size=1, max_size=5))
def test_shares_are_within_sampling_error(seed: int, weights: list[float]) -> None:
    total = math.fsum(weights)
    fractions = {f"s{i}": weight / total for i, weight in enumerate(weights)}
    count = 2000
    found = Counter(split_of(f"group {i}", fractions, seed) for i in range(count))
    assert set(found) <= set(fractions)
    for name, share in fractions.items():
        error = math.sqrt(share * (1 - share) / count)
        assert abs(found[name] / count - share) < 6 * error + 1e-9


@given(st.text(), st.integers(), st.floats(0, 0.9), st.floats(0, 0.9))
def test_a_larger_first_split_loses_no_group(text: str, seed: int, a: float, b: float) -> None:
    small, large = sorted((a, b))
    before = split_of(text, {"train": small, "test": 1 - small}, seed)
    after = split_of(text, {"train": large, "test": 1 - large}, seed)
    assert (before, after) != ("train", "test")


def test_an_empty_split_gets_nothing_even_at_the_end() -> None:
    tenths = {f"s{i}": 0.1 for i in range(10)} | {"none": 0.0}
    assert "none" not in {split_of(str(i), tenths) for i in range(5000)}


@pytest.mark.parametrize(
    "fractions", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": math.nan, "b": 1.0}]
)
def test_wrong_fractions_are_refused(fractions: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="sum to 1"):
        split_of("a", fractions)


def test_a_question_without_group_is_grouped_with_its_copies() -> None:
    copies = ["Who is E\u0301mile?", "who  is \u00e9mile? ", "WHO IS \u00c9MILE?"]
    assert len({group_of(_question(text)) for text in copies}) == 1
    assert group_of(_question("Who is Emil?")) != group_of(_question(copies[0]))
    assert group_of(_question(copies[0], "g")) == "g"
