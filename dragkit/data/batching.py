"""Which questions go into which batch: bounded by facts, in an order keyed by seed and epoch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

_WORD = 2**64 - 1


class FactBudgetBatchSampler:
    """Batches of at most `batch_size` questions and `max_facts` facts, so that memory is flat.

    The order of an epoch is a function of (seed, epoch) alone: nothing has to be saved for a resume
    to continue at any batch. No question is left out. One above the bound is a batch by itself.

    Args:
        fact_counts: int [Q] facts of each question.
        batch_size: maximum of questions in a batch.
        max_facts: maximum of facts in a batch.
        seed: seed of the order.
        shuffle: False keeps the order of the file.

    Raises:
        ValueError: a bound below 1.
    """

    def __init__(
        self,
        fact_counts: np.ndarray,
        *,
        batch_size: int,
        max_facts: int,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        if batch_size < 1 or max_facts < 1:
            raise ValueError(f"bounds must be at least 1, got {batch_size=} and {max_facts=}")
        self.fact_counts = np.asarray(fact_counts, dtype=np.int64)
        self.batch_size = batch_size
        self.max_facts = max_facts
        self.seed = seed
        self.shuffle = shuffle

    def permutation(self, epoch: int) -> np.ndarray:
        """int64 [Q] order of an epoch: questions sorted by one Philox word each.

        The raw words are used, since numpy keeps them, but not its `permutation`, the same from
        version to version.
        """
        key = np.array([self.seed & _WORD, epoch & _WORD], dtype=np.uint64)
        philox = np.random.Philox(key=key)
        return np.argsort(philox.random_raw(len(self.fact_counts)), kind="stable")

    def _cut(self, order: Iterable[int]) -> list[list[int]]:
        """Consecutive runs of `order` within both bounds."""
        batches: list[list[int]] = []
        facts = 0
        counts = self.fact_counts.tolist()
        for row in order:
            fits = batches and len(batches[-1]) < self.batch_size
            if fits and facts + counts[row] <= self.max_facts:
                batches[-1].append(row)
                facts += counts[row]
            else:
                batches.append([row])
                facts = counts[row]
        return batches

    def batches(self, epoch: int) -> list[list[int]]:
        """All batches of an epoch."""
        return self._cut(self.permutation(epoch).tolist()) if self.shuffle else self.in_file_order()

    def in_file_order(self, limit: int | None = None) -> list[list[int]]:
        """All batches in file order, as for validation. `limit` takes the first questions only."""
        count = len(self.fact_counts)
        return self._cut(range(count if limit is None else min(limit, count)))
