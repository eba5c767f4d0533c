"""Cuts a subgraph around topic entities by personalised PageRank, without the answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from dragkit.demo.kb import KnowledgeBase

RESTART = 0.25
ITERATIONS = 20
# The last bits of symmetric flows differ between machines, so flows are rounded before they are
# compared.
_FLOW_STEPS = 1e11
_TIE_BITS = 24


class FactRanker:
    """Ranks facts by the flow of a random walk that restarts at the topic entities.

    At an entity the walk picks one of its steps (a relation in one direction), then one of the
    step's facts, both uniformly. So a country's one capital weighs as much as its hundred mountains
    together. The flow is p = restart * topics + (1 - restart) * W p. A fact's rank is the flow
    through it from both ends.
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
        # The walk follows facts in both directions: E rows leave the head, then E the tail.
        start_rows = np.concatenate([self._head, self._tail])
        steps = np.concatenate([relation, relation + len(relations)])
        probability = _transition_probabilities(start_rows, steps, 2 * len(relations))
        self._from_head, self._from_tail = np.split(probability, 2)
        ends = np.concatenate([self._tail, self._head])
        size = (len(kb.entities), len(kb.entities))
        self._transition = sparse.coo_array((probability, (ends, start_rows)), shape=size).tocsr()

    def rank(
        self, topics: Sequence[Sequence[str]], keys: NDArray[np.uint64], limit: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ranks facts for a batch of topic sets.

        Args:
            topics: B sets of entity names.
            keys: uint64 [B], seeds of the order of ties.
            limit: number of facts K.

        Returns:
            order: int64 [B, K], indices of facts, best first. Unreached facts come last.
            reached: int64 [B], number of facts that the walk reaches.
        """
        seeds = np.zeros((len(self._row), len(topics)))  # [N, B]
        for column, names in enumerate(topics):
            seeds[[self._row[name] for name in names], column] = 1.0 / len(names)
        flow = seeds
        for _ in range(ITERATIONS):
            flow = self._restart * seeds + (1.0 - self._restart) * (self._transition @ flow)
        fact_flow = self._from_head[:, None] * flow[self._head]  # [E, B]
        fact_flow += self._from_tail[:, None] * flow[self._tail]
        # Distinct integers: the high bits hold the flow, the low bits a permutation of the facts.
        steps = np.rint(fact_flow.T * _FLOW_STEPS).astype(np.uint64)  # [B, E]
        score = (steps << np.uint64(_TIE_BITS)) | _permuted(keys, steps.shape[1])
        best = np.argpartition(score, -limit, axis=1)[:, -limit:]  # [B, K]
        by_score = np.argsort(np.take_along_axis(score, best, axis=1), axis=1)[:, ::-1]
        return np.take_along_axis(best, by_score, axis=1), (steps > 0).sum(axis=1)


def _transition_probabilities(
    start_rows: NDArray[np.int64], steps: NDArray[np.int64], num_steps: int
) -> NDArray[np.float64]:
    """Probability of each (start, step) row among the rows of its start: float64 [2E]."""
    pair, pair_of, per_pair = np.unique(
        start_rows * num_steps + steps, return_inverse=True, return_counts=True
    )
    steps_at = np.bincount(pair // num_steps)
    return 1.0 / (steps_at[start_rows] * per_pair[pair_of])


def _permuted(keys: NDArray[np.uint64], num_facts: int) -> NDArray[np.uint64]:
    """Distinct integers below 2^24 for the facts of each key: uint64 [B, E]."""
    mask = np.uint64((1 << _TIE_BITS) - 1)
    # Adding, multiplying by an odd number and folding the upper half down are bijections mod 2^24,
    # and integer arithmetic is the same on every machine.
    word = (keys[:, None] + np.arange(num_facts, dtype=np.uint64)) & mask
    for odd in (0x9E3779B1, 0x85EBCA77):
        word = (word * np.uint64(odd)) & mask
        word ^= word >> np.uint64(_TIE_BITS // 2)
    return word
