"""Personalised PageRank by pushes along the facts around the topics.

A walker starts at a topic. At each node it returns to the topics with the probability `restart`,
and otherwise takes one of the node's facts. PageRank is the share of time at each node.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dragkit.data.build.walk import Walk, check_rows

# Sweeps over all facts cost less than pushes along more than this fraction of them.
_SWEEP_FRACTION = 0.25
# Residuals over degrees at which the search for a budget of facts begins and ends. Rounding keeps
# sweeps from reaching less than the last one.
_FIRST_LEVEL, _LAST_LEVEL = 1e-4, 1e-14
_LEVEL_STEP = 4


class NodeRanks(NamedTuple):
    """PageRank of the nodes that the walk has reached.

    Attributes:
        nodes: int64 [n] distinct nodes, in any order.
        rank: float64 [n] PageRank.
        degree: int64 [n] ends of facts at each node.
        is_pushed: bool [n] whether the rank flowed on. Elsewhere it is within the tolerance of 0.
    """

    nodes: np.ndarray
    rank: np.ndarray
    degree: np.ndarray
    is_pushed: np.ndarray

    def flow(self) -> np.ndarray:
        """Returns float64 [n] the rank that goes over each end of a fact, but for the restart."""
        return self.rank / np.maximum(self.degree, 1)

    def least_flow(self, num_facts: int) -> float:
        """Returns a flow that at least `num_facts` facts have at one of their ends, or 0.0.

        It is the lowest of the nodes of highest flow that have two ends for each fact, since a fact
        has at most two among them. 0.0 means that the nodes that were pushed have fewer.
        """
        flow, degree = self.flow()[self.is_pushed], self.degree[self.is_pushed]
        order = np.argsort(-flow)
        enough = np.searchsorted(np.cumsum(degree[order]), 2 * num_facts)
        return float(flow[order[enough]]) if enough < len(order) else 0.0


class _State:
    """The nodes that the pushes of one question have reached, in order of discovery.

    Attributes:
        nodes, degree: int64 [n].
        rank: float64 [n] what has stayed.
        residual: float64 [n] what has arrived and not been pushed on.
        is_pushed: bool [n].
    """

    def __init__(self) -> None:
        self.nodes, self.degree = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        self.rank, self.residual = np.zeros(0), np.zeros(0)
        self.is_pushed = np.zeros(0, dtype=bool)

    def reach(self, nodes: np.ndarray, degree: np.ndarray) -> None:
        """Appends nodes."""
        zeros = np.zeros(len(nodes))
        self.nodes = np.concatenate([self.nodes, nodes])
        self.degree = np.concatenate([self.degree, degree])
        self.rank = np.concatenate([self.rank, zeros])
        self.residual = np.concatenate([self.residual, zeros])
        # A node without facts has nothing to push.
        self.is_pushed = np.concatenate([self.is_pushed, degree == 0])

    def ranks(self, restart: float) -> NodeRanks:
        """The ranks so far, with what would stay of the residuals."""
        rank = self.rank + restart * self.residual
        return NodeRanks(self.nodes, rank, self.degree, self.is_pushed)


class PageRank:
    """Personalised PageRank of one question after another over the same graph.

    The mass of a node spreads evenly over the ends of facts at it, so that parallel facts count as
    often as they occur and a loop returns twice. A node without facts keeps what it has. The result
    depends on the question alone, to the last bit.

    Nodes are pushed while their residual is above `tolerance * degree`. One round of pushes thus
    goes along less than `1 / tolerance` facts, whatever the size of the graph. Where these would be
    a large fraction of all facts, sweeps over the whole graph take over.

    Args:
        walk: N nodes.
        restart: probability of a return to the topics, above 0 and below 1.

    Raises:
        ValueError: `restart` is out of range.
    """

    def __init__(self, walk: Walk, restart: float = 0.25) -> None:
        if not 0 < restart < 1:
            raise ValueError(f"restart is {restart}, but has to be above 0 and below 1")
        self.walk, self.restart = walk, restart
        # One more than the position of each node among the reached nodes, 0 elsewhere. The system
        # gives memory only to the pages that a question writes.
        self._place = np.zeros(walk.num_nodes, dtype=np.int32)

    def __call__(self, topics: Sequence[int], tolerance: float) -> NodeRanks:
        """Ranks the nodes around topics, with an error of at most `tolerance * degree`.

        Args:
            topics: rows of nodes that share the restart equally. A repeated topic counts once.
            tolerance: at least 1e-14.

        Raises:
            ValueError: the tolerance is out of range, or there is no node of such a row.
        """
        if not _LAST_LEVEL <= tolerance <= 1:
            raise ValueError(f"tolerance is {tolerance}, but has to be from {_LAST_LEVEL} to 1")
        state = self._start(topics)
        done = self._push_down_to(state, tolerance)
        ranks = state.ranks(self.restart) if done else self._sweep(state, tolerance)
        self._place[state.nodes] = 0
        return ranks

    def for_budget(self, topics: Sequence[int], num_facts: int, tolerance: float) -> NodeRanks:
        """Ranks as many nodes as it takes to find the facts of the highest rank.

        The error of a node is at most `degree` times `tolerance` times the flow that the last one
        of `num_facts` facts has. This ends earlier if all nodes around the topics have fewer facts,
        or further ones would have a flow below 1e-14.

        Args:
            topics: as for a call.
            num_facts: at least 1.
            tolerance: above 0.

        Raises:
            ValueError: there is no node of such a row.
        """
        state, level = self._start(topics), _FIRST_LEVEL
        while True:
            done, ranks = self._push_down_to(state, level), state.ranks(self.restart)
            sought = tolerance * ranks.least_flow(num_facts)
            if not done:
                ranks = self._sweep(state, max(sought, _LAST_LEVEL))
            are_all_found = not sought and state.is_pushed.all()
            if not done or are_all_found or level <= max(sought, _LAST_LEVEL):
                break
            level = max(level / _LEVEL_STEP, sought)
        self._place[state.nodes] = 0
        return ranks

    def _start(self, topics: Sequence[int]) -> _State:
        """Pushes from the topics, even if they have so many facts that little goes over each."""
        state, distinct = _State(), np.unique(np.asarray(topics, dtype=np.int64))
        check_rows("topics", distinct, self.walk.num_nodes, "entities")
        self._reach(state, distinct)
        stays = 1 / max(len(distinct), 1)
        state.rank[state.is_pushed] = stays
        active = np.flatnonzero(~state.is_pushed)
        state.residual[active] = stays
        self._push(state, active)
        return state

    def _reach(self, state: _State, nodes: np.ndarray) -> None:
        """Appends nodes that are new, which may repeat."""
        start = len(state.nodes)
        # Of repeated nodes the last one writes, which finds the distinct ones without sorting.
        self._place[nodes] = order = np.arange(1, len(nodes) + 1, dtype=np.int32)
        nodes = nodes[self._place[nodes] == order]
        self._place[nodes] = np.arange(start + 1, start + len(nodes) + 1)
        state.reach(nodes, self.walk.degree(nodes))

    def _push_down_to(self, state: _State, level: float) -> bool:
        """Pushes until all residuals are within `level * degree`. False if sweeps should do it."""
        while True:
            active = np.flatnonzero(state.residual > level * state.degree)
            if not len(active):
                return True
            if state.degree[active].sum() > _SWEEP_FRACTION * self.walk.num_ends:
                return False
            self._push(state, active)

    def _push(self, state: _State, active: np.ndarray) -> None:
        """Keeps `restart` of the residual of the nodes at `active`, and spreads the rest."""
        mass = state.residual[active]
        state.residual[active] = 0
        state.rank[active] += self.restart * mass
        state.is_pushed[active] = True
        reached, origin = self.walk.steps(state.nodes[active])
        self._reach(state, reached[self._place[reached] == 0].astype(np.int64))
        share = (1 - self.restart) * mass / state.degree[active]
        np.add.at(state.residual, self._place[reached] - 1, share[origin])

    def _sweep(self, state: _State, tolerance: float) -> NodeRanks:
        """Spreads all residuals over the whole graph at once.

        What they add to the rank is the fixed point x of `x = source + keep * A (x / degree)`. The
        eigenvalues of a step are within `keep` of 0. For these the weights of the Chebyshev
        iteration are known, and so is the number of steps: each one multiplies the bound of the
        residual's norm by `decay`.
        """
        keep = 1 - self.restart
        degree = self.walk.degree(np.arange(self.walk.num_nodes))
        inverse = 1 / np.maximum(degree, 1)
        rank, source = np.zeros(len(degree)), np.zeros(len(degree))
        rank[state.nodes] = state.rank
        source[state.nodes] = self.restart * state.residual
        decay = keep / (1 + math.sqrt(1 - keep**2))
        norm = math.sqrt((source**2 * inverse).sum())
        steps = math.log(self.restart * tolerance / (2 * norm)) / math.log(decay)
        before, now, weight = np.zeros(len(degree)), source, 1 / (1 - keep**2 / 2)
        for _ in range(math.ceil(steps)):
            after = source + keep * (self.walk.matrix @ (now * inverse))
            before, now = now, before + weight * (after - before)
            weight = 1 / (1 - keep**2 * weight / 4)
        rank += source + keep * (self.walk.matrix @ (now * inverse))
        nodes = np.flatnonzero(rank)
        # The error may have either sign.
        rank = np.maximum(rank[nodes], 0)
        return NodeRanks(nodes, rank, degree[nodes], np.ones(len(nodes), dtype=bool))
