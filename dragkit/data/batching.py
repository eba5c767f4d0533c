"""Batches of questions: bounded by facts, in an order that follows from seed and epoch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

_MASK_64 = 2**64 - 1


class FactBudgetBatchSampler:
    """Batches of at most `batch_size` questions and `max_facts` facts.

    The bound on facts keeps the memory of a step flat. The order of an epoch is a function of
    (seed, epoch), so a resume needs no saved sampler state. Every used question is in one batch. A
    question with more than `max_facts` facts is a batch alone.

    Args:
        fact_counts: int [Q] facts of each question.
        batch_size: maximum number of questions in a batch.
        max_facts: maximum number of facts in a batch.
        seed: seed of the order.
        rows: int [Q'] ascending questions to use. None uses all.

    Raises:
        ValueError: a bound is below 1.
    """

    def __init__(
        self,
        fact_counts: np.ndarray,
        *,
        batch_size: int,
        max_facts: int,
        seed: int = 0,
        rows: np.ndarray | None = None,
    ) -> None:
        if batch_size < 1 or max_facts < 1:
            raise ValueError(f"bounds must be at least 1, got {batch_size=} and {max_facts=}")
        self.fact_counts = np.asarray(fact_counts, dtype=np.int64)
        self.batch_size = batch_size
        self.max_facts = max_facts
        self.seed = seed
        self.rows = np.arange(len(self.fact_counts)) if rows is None else rows

    def permutation(self, epoch: int) -> np.ndarray:
        """Returns the rows in the order of an epoch, int64: one Philox word per row, sorted."""
        # NumPy guarantees the raw words across versions. It does not guarantee `permutation`.
        key = np.array([self.seed & _MASK_64, epoch & _MASK_64], dtype=np.uint64)
        philox = np.random.Philox(key=key)
        return self.rows[np.argsort(philox.random_raw(len(self.rows)), kind="stable")]

    def _split(self, order: Iterable[int]) -> list[list[int]]:
        """Cuts `order` greedily into batches within both bounds."""
        batches: list[list[int]] = []
        num_facts = 0
        counts = self.fact_counts.tolist()
        for row in order:
            has_room = batches and len(batches[-1]) < self.batch_size
            if has_room and num_facts + counts[row] <= self.max_facts:
                batches[-1].append(row)
                num_facts += counts[row]
            else:
                batches.append([row])
                num_facts = counts[row]
        return batches

    def batches(self, epoch: int) -> list[list[int]]:
        """Returns all batches of an epoch, as rows of the store."""
        return self._split(self.permutation(epoch).tolist())

    def in_file_order(self, limit: int | None = None) -> list[list[int]]:
        """Returns the batches of the first `limit` questions (None: of all) in file order."""
        return self._split(self.rows[:limit].tolist())
