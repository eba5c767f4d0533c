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
_FLOW_DECIMALS = 12


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

    def rank(self, topics: Sequence[Sequence[str]], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Fact indices, best first, for a batch of topic sets.

        Args:
            topics: B sets of entity names.
            keys: uint64 [B] settles ties, differently for each question.

        Returns:
            int64 [B, E], facts that the walk does not reach as -1 at the end.
        """
        seeds = np.zeros((len(self._row), len(topics)))  # [N, B]
        for column, names in enumerate(topics):
            seeds[[self._row[name] for name in names], column] = 1.0 / len(names)
        flow = seeds
        for _ in range(ITERATIONS):
            flow = self._restart * seeds + (1.0 - self._restart) * (self._walk @ flow)
        across = self._from_head[:, None] * flow[self._head]  # [E, B]
        across = across + self._from_tail[:, None] * flow[self._tail]
        across = np.round(across, _FLOW_DECIMALS).T  # [B, E]
        order = np.lexsort((_mix(keys, across.shape[1]), -across))
        return np.where(np.take_along_axis(across, order, axis=1) > 0, order, -1)


def _shares(starts: NDArray[np.int64], steps: NDArray[np.int64], num_steps: int) -> NDArray:
    """Probability of each (start, step) row among all rows of its start: float64 [rows]."""
    pair, pair_of, per_pair = np.unique(
        starts * num_steps + steps, return_inverse=True, return_counts=True
    )
    steps_at = np.bincount(pair // num_steps)
    return 1.0 / (steps_at[starts] * per_pair[pair_of])


def _mix(keys: NDArray[np.uint64], num_facts: int) -> NDArray[np.uint64]:
    """A hash of (key, fact): uint64 [B, E]; the finaliser of SplitMix64, the same everywhere."""
    word = keys[:, None] + np.arange(num_facts, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
