"""Labels moved on purpose and fewer questions: counts, rates and distributions."""

from __future__ import annotations

import json
import random
from math import sqrt
from pathlib import Path

import numpy as np
import pytest

from dragkit.data.batching import FactBudgetBatchSampler
from dragkit.data.handicap import noisy_labels, random_questions
from dragkit.data.store import PackedStore

QUESTIONS, FACTS, POSITIVE = 1500, 24, 4
NEGATIVE = FACTS - POSITIVE


def star(name: str, answers: list[int], facts: int = FACTS) -> dict:
    """A topic with `facts` neighbours, of which the answers give positive facts."""
    return {
        "id": name,
        "question": "q",
        "topic_entities": "t",
        "answer": [f"n{i:03}" for i in answers],
        "triples": [["t", "r", f"n{i:03}"] for i in range(facts)],
    }


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    draw = random.Random(0)
    return [star(f"q{i}", draw.sample(range(FACTS), POSITIVE)) for i in range(QUESTIONS)]


def pack(rows: list[dict], folder: Path) -> PackedStore:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PackedStore.build_or_open(path, cache_dir=folder)


@pytest.fixture(scope="module")
def store(rows: list[dict], tmp_path_factory: pytest.TempPathFactory) -> PackedStore:
    return pack(rows, tmp_path_factory.mktemp("stars"))


def chi_square(counts: np.ndarray) -> float:
    """Pearson's statistic against equal counts, in standard deviations above its mean."""
    expected = counts.sum() / len(counts)
    statistic = ((counts - expected) ** 2 / expected).sum()
    return (statistic - (len(counts) - 1)) / sqrt(2 * (len(counts) - 1))


@pytest.mark.parametrize("probability", [0.1, 0.3, 0.6, 0.95])
def test_the_rate_and_the_counts(store: PackedStore, probability: float) -> None:
    before = store.labels.reshape(QUESTIONS, FACTS)
    after = noisy_labels(store, probability, seed=5).reshape(QUESTIONS, FACTS)
    assert after.dtype == np.uint8
    assert set(np.unique(after)) == {0, 1}
    assert (after.sum(1) == POSITIVE).all()
    lost, gained = before > after, after > before
    assert (lost.sum(1) == gained.sum(1)).all()
    moved, total = lost.sum(), QUESTIONS * POSITIVE
    assert abs(moved / total - probability) < 4 * sqrt(probability * (1 - probability) / total)
    # The store itself stays as it is.
    assert np.array_equal(before.ravel(), store.labels)


def test_positives_leave_alike_and_negatives_receive_alike(store: PackedStore) -> None:
    before = store.labels.reshape(QUESTIONS, FACTS).astype(bool)
    leaving, receiving = np.zeros(POSITIVE, int), np.zeros(NEGATIVE, int)
    for seed in range(4):
        after = noisy_labels(store, 0.5, seed).reshape(QUESTIONS, FACTS).astype(bool)
        leaving += (~after)[before].reshape(QUESTIONS, POSITIVE).sum(0)
        receiving += after[~before].reshape(QUESTIONS, NEGATIVE).sum(0)
    assert leaving.sum() == receiving.sum() > 10_000
    assert chi_square(leaving) < 4
    assert chi_square(receiving) < 4


def test_seeds_are_independent(store: PackedStore) -> None:
    positive = store.labels == 1
    moved = [(noisy_labels(store, 0.3, seed) == 0)[positive] for seed in (0, 1, 2**32 - 1)]
    total = positive.sum()
    for first, second in ((0, 1), (0, 2), (1, 2)):
        both = (moved[first] & moved[second]).mean()
        assert abs(both - 0.09) < 4 * sqrt(0.09 * 0.91 / total)


def test_more_noise_moves_the_same_labels_and_more(store: PackedStore) -> None:
    few, many = (noisy_labels(store, p, seed=3) < store.labels for p in (0.2, 0.4))
    assert few.sum() < many.sum()
    assert not (few & ~many).any()


def test_no_noise_changes_nothing(store: PackedStore) -> None:
    assert np.array_equal(noisy_labels(store, 0.0, seed=1), store.labels)


def test_other_questions_and_their_order_have_no_influence(
    rows: list[dict], store: PackedStore, tmp_path: Path
) -> None:
    whole = noisy_labels(store, 0.4, seed=2).reshape(QUESTIONS, FACTS)
    chosen = random.Random(1).sample(range(QUESTIONS), 50)
    part = noisy_labels(pack([rows[i] for i in chosen], tmp_path), 0.4, seed=2)
    assert np.array_equal(part.reshape(50, FACTS), whole[chosen])


def test_questions_without_room(tmp_path: Path) -> None:
    """A question moves at most as many labels as it has negative facts."""
    cases = [
        star("all positive", list(range(5)), facts=5),
        star("one negative", list(range(9)), facts=10),
        star("none positive", [], facts=6),
        star("one fact", [0], facts=1),
        star("no fact", [0], facts=0),
    ]
    store = pack(cases, tmp_path)
    spans = list(zip(store.fact_ptr[:-1], store.fact_ptr[1:], strict=True))
    negatives = set()
    for seed in range(200):
        after = noisy_labels(store, 0.99, seed)
        by_question = [after[start:stop].tolist() for start, stop in spans]
        for row in (0, 2, 3, 4):
            assert by_question[row] == list(store.question(row).labels)
        assert sum(by_question[1]) == 9
        negatives.add(by_question[1].index(0))
    # Which of the nine labels moves is random. The tenth fact is negative if none moves.
    assert negatives >= set(range(9))


def test_without_questions_with_facts(tmp_path: Path) -> None:
    store = pack([star("no fact", [0], facts=0)], tmp_path)
    assert noisy_labels(store, 0.5, seed=0).tolist() == []


@pytest.mark.parametrize(
    ("fraction", "count"), [(1.0, 1500), (0.5, 750), (0.1, 150), (0.0009, 1), (1e-9, 1)]
)
def test_the_number_of_questions(store: PackedStore, fraction: float, count: int) -> None:
    chosen = random_questions(store, fraction, seed=0)
    assert len(chosen) == count
    assert (np.diff(chosen) > 0).all()
    assert set(chosen) <= set(range(QUESTIONS))


def test_a_smaller_fraction_is_a_subset_and_seeds_differ(store: PackedStore) -> None:
    tenth, half = (set(random_questions(store, f, seed=7)) for f in (0.1, 0.5))
    assert tenth < half
    others = [set(random_questions(store, 0.5, seed)) for seed in range(3)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        # Hypergeometric: the mean is 375 and the standard deviation 9.7.
        assert abs(len(others[a] & others[b]) - 375) < 4 * 9.7


def test_every_question_is_chosen_alike(store: PackedStore) -> None:
    times = np.zeros(QUESTIONS, int)
    for seed in range(300):
        times[random_questions(store, 0.1, seed)] += 1
    assert chi_square(times.reshape(50, 30).sum(1)) < 4
    assert chi_square(times) < 4


def test_the_order_of_the_file_has_no_influence(
    rows: list[dict], store: PackedStore, tmp_path: Path
) -> None:
    reversed_store = pack(rows[::-1], tmp_path)
    chosen = random_questions(store, 0.2, seed=4)
    assert np.array_equal(
        np.sort(QUESTIONS - 1 - random_questions(reversed_store, 0.2, seed=4)), chosen
    )


def test_noise_and_choice_are_independent(store: PackedStore) -> None:
    """Chosen questions are not those whose labels move."""
    moved = (noisy_labels(store, 0.3, seed=0) < store.labels).reshape(QUESTIONS, FACTS).sum(1)
    chosen = random_questions(store, 0.3, seed=0)
    total = len(chosen) * POSITIVE
    assert abs(moved[chosen].sum() / total - 0.3) < 4 * sqrt(0.21 / total)


def test_batches_of_chosen_rows(store: PackedStore) -> None:
    chosen = random_questions(store, 0.01, seed=0)
    batch_sampler = FactBudgetBatchSampler(
        store.fact_counts, batch_size=4, max_facts=1000, rows=chosen
    )
    assert sorted(sum(batch_sampler.batches(0), [])) == chosen.tolist()
    assert batch_sampler.batches(0) != batch_sampler.batches(1)
    assert sum(batch_sampler.in_file_order(3), []) == chosen[:3].tolist()


def test_the_draws_never_change(tmp_path: Path) -> None:
    """A resumed run must see the labels and the questions of the interrupted run."""
    store = pack([star(f"q{i}", [0, 1, 2], facts=8) for i in range(6)], tmp_path)
    moved = noisy_labels(store, 0.5, seed=42).reshape(6, 8)
    assert [np.flatnonzero(labels).tolist() for labels in moved] == [
        [0, 4, 5],
        [1, 6, 7],
        [1, 2, 3],
        [0, 1, 2],
        [4, 5, 7],
        [0, 1, 3],
    ]
    assert random_questions(store, 0.5, seed=42).tolist() == [1, 2, 4]
