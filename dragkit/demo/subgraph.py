"""Cuts a small subgraph around topic entities by personalised PageRank, blind to the answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from dragkit.demo.kb import KnowledgeBase

RESTART = 0.25
ITERATIONS = 20
# Flows that are equal by symmetry differ in their last bits from one machine to the next.
_FLOW_UNITS = 1e11
_TIE_BITS = 24


class FactRanker:
    """Ranks facts by the flow of a random walk that restarts at the topic entities.

    A walker at an entity picks one of the steps it has there (a relation in one direction), then
    one of that step's facts, both uniformly: a country's only capital is not drowned by its hundred
    mountains. p = restart * topics + (1 - restart) * W p; the rank of a fact is the flow across it
    from both of its ends.
    """

    def __init__(self, kb: KnowledgeBase, restart: float = RESTART) -> None:
        self._restart = restart
        self._row = {name: row for row, name in enumerate(kb.entities)}
        self._fact = {fact: index for index, fact in enumerate(kb.facts)}
        relations = sorted({relation for _, relation, _ in kb.facts})
        relation_row = {name: row for row, name in enumerate(relations)}
        relation = np.array([relation_row[name] for _, name, _ in kb.facts])
        self._head = np.array([self._row[head] for head, _, _ in kb.facts])
        self._tail = np.array([self._row[tail] for _, _, tail in kb.facts])
        starts = np.concatenate([self._head, self._tail])
        steps = np.concatenate([relation, relation + len(relations)])
        share = _shares(starts, steps, 2 * len(relations))
        self._from_head, self._from_tail = np.split(share, 2)
        ends = np.concatenate([self._tail, self._head])
        size = (len(kb.entities), len(kb.entities))
        self._walk = sparse.coo_array((share, (ends, starts)), shape=size).tocsr()

    def rank(
        self, topics: Sequence[Sequence[str]], keys: NDArray[np.uint64], limit: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The best facts, best first, for a batch of topic sets.

        Args:
            topics: B sets of entity names.
            keys: uint64 [B] settles ties, differently for each question.
            limit: number of facts K to return, at most all.

        Returns:
            order: int64 [B, K] rows of the facts; those that no walk reaches come last.
            reached: int64 [B], the number of facts that a walk reaches.
        """
        seeds = np.zeros((len(self._row), len(topics)))  # [N, B]
        for column, names in enumerate(topics):
            seeds[[self._row[name] for name in names], column] = 1.0 / len(names)
        flow = seeds
        for _ in range(ITERATIONS):
            flow = self._restart * seeds + (1.0 - self._restart) * (self._walk @ flow)
        across = self._from_head[:, None] * flow[self._head]  # [E, B]
        across += self._from_tail[:, None] * flow[self._tail]
        # Whole numbers that all differ: flow above, a permutation of the facts below.
        steps = np.rint(across.T * _FLOW_UNITS).astype(np.uint64)  # [B, E]
        score = (steps << np.uint64(_TIE_BITS)) | _shuffled(keys, steps.shape[1])
        best = np.argpartition(score, -limit, axis=1)[:, -limit:]  # [B, K]
        by_score = np.argsort(np.take_along_axis(score, best, axis=1), axis=1)[:, ::-1]
        return np.take_along_axis(best, by_score, axis=1), (steps > 0).sum(axis=1)


def _shares(starts: NDArray[np.int64], steps: NDArray[np.int64], num_steps: int) -> NDArray:
    """Probability of each (start, step) row among all rows of its start: float64 [rows]."""
    pair, pair_of, per_pair = np.unique(
        starts * num_steps + steps, return_inverse=True, return_counts=True
    )
    steps_at = np.bincount(pair // num_steps)
    return 1.0 / (steps_at[starts] * per_pair[pair_of])


def _shuffled(keys: NDArray[np.uint64], num_facts: int) -> NDArray[np.uint64]:
    """Distinct numbers below 2^24 for the facts of each key: uint64 [B, E], the same everywhere."""
    mask = np.uint64((1 << _TIE_BITS) - 1)
    # Adding, multiplying by an odd number and folding the upper half down are all one to one.
    word = (keys[:, None] + np.arange(num_facts, dtype=np.uint64)) & mask
    for odd in (0x9E3779B1, 0x85EBCA77):
        word = (word * np.uint64(odd)) & mask
        word ^= word >> np.uint64(_TIE_BITS // 2)
    return word
