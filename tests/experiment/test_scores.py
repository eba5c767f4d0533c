"""Means over seeds and the two-way bootstrap, against enumeration and normal theory."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest

from dragkit.errors import DataError
from dragkit.experiment.scores import (
    Difference,
    mean_over_seeds,
    paired_difference,
    read_scores,
    stack,
)

NAN = math.nan


def test_mean_and_standard_error_over_seeds() -> None:
    scores = np.array([[0.0, 1.0, NAN], [1.0, 1.0, 0.5], [NAN, 0.25, 0.25]])
    means = [0.5, 2.5 / 3, 0.25]
    found = mean_over_seeds(scores)
    assert found is not None
    assert found.mean == pytest.approx(statistics.fmean(means))
    assert found.error == pytest.approx(statistics.stdev(means) / math.sqrt(3))
    single = mean_over_seeds(scores[:1])
    assert single is not None and single.mean == 0.5 and math.isnan(single.error)
    assert mean_over_seeds(np.array([[0.5, 1.0], [NAN, NAN]])) is None


def test_the_interval_is_that_of_all_draws_of_seeds_and_questions() -> None:
    difference = np.array([[0.0, 0.5, -1.0], [1.0, 0.25, -0.25]])
    seeds, questions = (list(itertools.product(range(n), repeat=n)) for n in (2, 3))
    exact = sorted(
        float(difference[np.ix_(rows, columns)].mean()) for rows in seeds for columns in questions
    )
    found = paired_difference(difference, np.zeros_like(difference), draws=200_000)
    assert found is not None and found.mean == pytest.approx(difference.mean())
    # 2.5 % of these 108 equally likely draws end within the third, so neither end is on a step.
    assert len(exact) == 108
    assert found.low == pytest.approx(np.quantile(exact, 0.025, method="inverted_cdf"))
    assert found.high == pytest.approx(np.quantile(exact, 0.975, method="inverted_cdf"))


def test_equal_arms_differ_by_exactly_zero() -> None:
    scores = np.random.default_rng(0).random((3, 50))
    scores[:, 7] = NAN
    assert paired_difference(scores, scores.copy()) == Difference(0.0, 0.0, 0.0)


def test_only_questions_that_are_defined_everywhere_are_compared() -> None:
    scores = np.array([[1.0, NAN, 0.5], [1.0, 0.0, NAN]])
    assert paired_difference(scores, np.zeros_like(scores)) == Difference(1.0, 1.0, 1.0)
    assert paired_difference(scores[:, 1:], np.zeros((2, 2))) is None


def test_the_draws_do_not_depend_on_the_size_of_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from dragkit.experiment import scores as module

    a, b = np.random.default_rng(1).random((2, 3, 40))
    whole = paired_difference(a, b, draws=500)
    monkeypatch.setattr(module, "_CHUNK", 40 * 7)
    assert paired_difference(a, b, draws=500) == whole


@pytest.mark.parametrize(
    ("num_seeds", "seed_sd", "least", "most"),
    # Two-way draws count the noise of single answers twice, so their intervals are wide where it
    # dominates. Where seeds dominate, five of them give an interval that is too narrow.
    [(1, 0.0, 0.90, 0.98), (5, 0.03, 0.93, 1.0), (10, 0.2, 0.88, 0.98), (5, 0.5, 0.76, 0.92)],
)
def test_coverage(num_seeds: int, seed_sd: float, least: float, most: float) -> None:
    """The interval holds the true difference of normal data about as often as it says."""
    random, truth, trials, hits = np.random.default_rng(2), 0.1, 200, 0
    for _ in range(trials):
        question = 0.3 * random.normal(size=(1, 150))
        noise = 0.3 * random.normal(size=(num_seeds, 150))
        difference = truth + seed_sd * random.normal(size=(num_seeds, 1)) + question + noise
        found = paired_difference(difference, np.zeros_like(difference), draws=400)
        assert found is not None
        hits += found.low <= truth <= found.high
    assert least <= hits / trials <= most, hits / trials


def test_one_seed_gives_the_interval_of_normal_theory() -> None:
    difference = np.random.default_rng(3).normal(0.2, 1.0, size=(1, 2000))
    found = paired_difference(difference, np.zeros_like(difference))
    assert found is not None
    half = 1.96 * difference.std() / math.sqrt(difference.size)
    assert found.low == pytest.approx(difference.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(difference.mean() + half, abs=0.05 * half)


def test_reading_of_scores(tmp_path: Path) -> None:
    path = tmp_path / "test_predictions.jsonl"
    rows = [{"id": "a", "scores": {"x": 0.5, "y": 1}}, {"id": "b", "scores": {"x": 0.25}}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = read_scores(path)
    assert scores.ids == ("a", "b")
    np.testing.assert_array_equal(stack([scores], "y"), [[1.0, NAN]])
    np.testing.assert_array_equal(stack([scores, scores], "z"), np.full((2, 2), NAN))
    for text in ('{"id": "a"}\n', "[]\n", '{"id": "a", "sc', '{"id": "a", "scores": {"x": "no"}}'):
        path.write_text(text)
        with pytest.raises(DataError, match=r"test_predictions\.jsonl: holds no predictions"):
            read_scores(path)
