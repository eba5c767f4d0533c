"""Steps over a graph in either direction of its facts, without excluded relations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from scipy.sparse import csr_array

from dragkit.data.build.graph import Graph

# Facts looked at together where all of a mapped graph are read.
_CHUNK = 1 << 22


def _ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Returns start[0], start[0] + 1, ... with count[0] numbers, then those of start[1], ..."""
    before = np.cumsum(count) - count
    return np.arange(count.sum()) + np.repeat(start - before, count)


class Walk:
    """The facts at each entity of a graph, except those of excluded relations.

    A fact has two ends, so that a loop is twice at its entity. Memory is touched where nodes are
    visited: a small neighbourhood of a large mapped graph costs little.

    Args:
        graph: N entities and E facts.
        excluded_relations: rows of relations whose facts are not there.

    Raises:
        ValueError: the graph has no relation of such a row.
    """

    def __init__(self, graph: Graph, excluded_relations: Sequence[int] = ()) -> None:
        excluded = np.asarray(excluded_relations, dtype=np.int64)
        check_rows("excluded_relations", excluded, len(graph.relations), "relations")
        self.num_nodes = graph.num_entities
        # Views without the type of mapped arrays, whose indexing is slow.
        self.head, self.tail = np.asarray(graph.head), np.asarray(graph.tail)
        self._relation = np.asarray(graph.relation)
        self._head_ptr, self._tail_ptr = np.asarray(graph.head_ptr), np.asarray(graph.tail_ptr)
        self._tail_order = np.asarray(graph.tail_order)
        self._kept: np.ndarray | None = None
        if len(excluded):
            self._kept = np.ones(len(graph.relations), dtype=bool)
            self._kept[excluded] = False
            self._excluded_ends = self._count_excluded_ends()
        self._is_marked = np.zeros(self.num_nodes, dtype=bool)

    def _count_excluded_ends(self) -> np.ndarray:
        """Returns int32 [N] ends of excluded facts at each node."""
        ends = np.zeros(self.num_nodes, dtype=np.int32)
        for start in range(0, len(self.head), _CHUNK):
            span = slice(start, start + _CHUNK)
            excluded = ~self._kept[self._relation[span]]
            for nodes in (self.head[span], self.tail[span]):
                np.add.at(ends, nodes[excluded], 1)
        return ends

    @property
    def num_ends(self) -> int:
        """Ends of all facts, those of excluded relations included."""
        return 2 * len(self.head)

    def degree(self, nodes: np.ndarray) -> np.ndarray:
        """Returns int64 [n] the ends of facts at each node."""
        degree = self._head_ptr[nodes + 1] - self._head_ptr[nodes]
        degree += self._tail_ptr[nodes + 1] - self._tail_ptr[nodes]
        if self._kept is not None:
            degree -= self._excluded_ends[nodes]
        return degree

    def _outgoing(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the facts whose heads are the nodes, and the position of each fact's node."""
        start = self._head_ptr[nodes]
        count = self._head_ptr[nodes + 1] - start
        return self._without_excluded(_ranges(start, count), count)

    def _incoming(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the facts whose tails are the nodes, and the position of each fact's node."""
        start = self._tail_ptr[nodes]
        count = self._tail_ptr[nodes + 1] - start
        return self._without_excluded(self._tail_order[_ranges(start, count)], count)

    def _without_excluded(
        self, facts: np.ndarray, count: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        position = np.repeat(np.arange(len(count)), count)
        if self._kept is None:
            return facts, position
        kept = self._kept[self._relation[facts]]
        return facts[kept], position[kept]

    def steps(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All steps from nodes over one fact.

        Args:
            nodes: int64 [n] distinct nodes.

        Returns:
            int32 [S] the node that each step reaches, and int64 [S] the position in `nodes` of the
            node that it leaves. S is the sum of the degrees.
        """
        forward, tails_from = self._outgoing(nodes)
        backward, heads_from = self._incoming(nodes)
        reached = np.concatenate([self.tail[forward], self.head[backward]])
        return reached, np.concatenate([tails_from, heads_from])

    def facts_at(self, nodes: np.ndarray) -> np.ndarray:
        """Returns int64 [F] the distinct facts that have an end at one of the distinct nodes."""
        forward, backward = self._outgoing(nodes)[0], self._incoming(nodes)[0]
        self._is_marked[nodes] = True
        facts = np.concatenate([forward, backward[~self._is_marked[self.head[backward]]]])
        self._is_marked[nodes] = False
        return facts

    @cached_property
    def matrix(self) -> csr_array:
        """float64 [N, N] the number of steps between two nodes. It needs memory for all facts."""
        shape = (self.num_nodes, self.num_nodes)
        kept = slice(None) if self._kept is None else self._kept[self._relation]
        head, tail = self.head[kept], self.tail[kept]
        forward = csr_array((np.ones(len(head)), (head, tail)), shape=shape)
        return csr_array(forward + forward.T)


def check_rows(name: str, rows: np.ndarray, count: int, kind: str) -> None:
    """Checks rows given by a caller.

    Raises:
        ValueError: one of them is below 0, or not below `count`.
    """
    wrong = rows[(rows < 0) | (rows >= count)]
    if len(wrong):
        raise ValueError(f"{name}: row {wrong[0]}, but the graph has {count} {kind}")
