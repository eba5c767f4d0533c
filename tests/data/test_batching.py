"""Batches are bounded and complete, and depend on seed and epoch only."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dragkit.data.batching import FactBudgetBatchSampler


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(0, 50), max_size=60),
    batch_size=st.integers(1, 9),
    max_facts=st.integers(1, 120),
    seed=st.integers(-5, 2**70),
    epoch=st.integers(0, 1000),
)
def test_bounds_and_completeness(
    counts: list[int], batch_size: int, max_facts: int, seed: int, epoch: int
) -> None:
    batch_sampler = FactBudgetBatchSampler(
        np.array(counts, dtype=np.int64), batch_size=batch_size, max_facts=max_facts, seed=seed
    )
    batches = batch_sampler.batches(epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(len(counts)))
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert len(batch) == 1 or sum(counts[row] for row in batch) <= max_facts
    # Greedy: the first question of a batch does not fit into the batch before.
    for batch, following in zip(batches, batches[1:], strict=False):
        full = len(batch) == batch_size
        assert full or sum(counts[row] for row in batch) + counts[following[0]] > max_facts
    assert batch_sampler.batches(epoch) == batches
    assert [row for batch in batch_sampler.in_file_order() for row in batch] == list(
        range(len(counts))
    )


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        batch_sampler = FactBudgetBatchSampler(
            np.ones(100), batch_size=100, max_facts=100, seed=seed
        )
        return tuple(batch_sampler.batches(epoch)[0])

    orders = {order(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_never_changes() -> None:
    """A resumed run must see the order of the interrupted run."""
    batch_sampler = FactBudgetBatchSampler(np.ones(8), batch_size=8, max_facts=8, seed=42)
    assert [batch_sampler.batches(epoch)[0] for epoch in range(2)] == [
        [7, 1, 6, 4, 3, 5, 0, 2],
        [4, 5, 3, 0, 2, 7, 1, 6],
    ]


def test_permutations_are_uniform() -> None:
    batch_sampler = FactBudgetBatchSampler(np.ones(6), batch_size=6, max_facts=6, seed=1)
    first = np.bincount([batch_sampler.permutation(epoch)[0] for epoch in range(3000)], minlength=6)
    # Five standard deviations of Binomial(3000, 1/6) are 102.
    assert np.abs(first - 500).max() < 102


def test_file_order_and_limit() -> None:
    batch_sampler = FactBudgetBatchSampler(np.array([5, 5, 20, 1]), batch_size=3, max_facts=10)
    assert batch_sampler.in_file_order() == [[0, 1], [2], [3]]
    assert batch_sampler.in_file_order(2) == [[0, 1]]
    assert batch_sampler.in_file_order(99) == [[0, 1], [2], [3]]
    assert batch_sampler.in_file_order(0) == []


@pytest.mark.parametrize("bounds", [(0, 5), (5, 0)])
def test_wrong_bounds(bounds: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        FactBudgetBatchSampler(np.ones(1), batch_size=bounds[0], max_facts=bounds[1])
