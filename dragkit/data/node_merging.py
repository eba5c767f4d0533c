"""Nodes that no retriever of this family can tell apart, merged: the coarsest equitable partition.

Two nodes with equal topic mark whose facts lead, relation by relation and in both directions, to
equally many nodes of every class get equal states in every layer, since a state is a function of
the node's own state and of the sum over its facts. So one state for each class is enough. The
classes are found by colour refinement (Weisfeiler and Leman, 1968; Cardon and Crochemore, 1982).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Each round tells nodes apart that differ one hop further away. A graph that is not settled then,
# such as a long chain, is left as it is.
_ROUNDS = 32

_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


_APART = np.uint64(1 << 62)


class MergedGraph(NamedTuple):
    """Graphs end to end, with the classes of their nodes in the place of the nodes.

    Classes and merged facts are numbered by their first member, so those of a graph stay together.

    Attributes:
        node_class: int32 [N] class of every node.
        size: int32 [M] nodes of every class.
        fact_row: int32 [E] merged fact of every fact.
        head, tail, relation: int32 [Q] classes and relation of every merged fact.
        head_count, tail_count: int32 [Q] its facts that start at a single node of the head's class,
            and that end in a single node of the tail's.
    """

    merged_node: np.ndarray
    size: np.ndarray
    merged_fact: np.ndarray
    head: np.ndarray
    tail: np.ndarray
    relation: np.ndarray
    head_count: np.ndarray
    tail_count: np.ndarray


def _mix(word: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit words that spreads every bit over all (Stafford's thirteenth mix)."""
    word = (word ^ (word >> np.uint64(30))) * _MIX[0]
    word = (word ^ (word >> np.uint64(27))) * _MIX[1]
    return word ^ (word >> np.uint64(31))


def _by_first(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups of equal keys, numbered by first member: group of every key, first member of each."""
    _, first, group = np.unique(key, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[group], first[order]


class _Neighbours:
    """Sums over the facts at every node. 64-bit words wrap, so any order gives the same sum."""

    def __init__(self, node: np.ndarray, num_nodes: int) -> None:
        self.order = np.argsort(node, kind="stable")
        self.ptr = np.zeros(num_nodes + 1, dtype=np.int64)
        np.cumsum(np.bincount(node, minlength=num_nodes), out=self.ptr[1:])

    def sum(self, word: np.ndarray) -> np.ndarray:
        """uint64 [E] to uint64 [N]."""
        total = np.zeros(len(word) + 1, dtype=np.uint64)
        np.cumsum(word[self.order], out=total[1:])
        return total[self.ptr[1:]] - total[self.ptr[:-1]]


def _refine(
    head: np.ndarray, tail: np.ndarray, relation: np.ndarray, graph: np.ndarray, mark: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Colour of every node, and bool [N] whether its graph has settled."""
    nodes = len(graph)
    into, out_of = _Neighbours(tail, nodes), _Neighbours(head, nodes)
    # Away from all colours: an equal word would cancel out.
    salt = relation.astype(np.uint64) * np.uint64(2) + _APART
    forward, inverse = _mix(salt), _mix(salt + np.uint64(1))
    colour, first = _by_first(2 * graph.astype(np.int64) + mark)
    num_graphs = int(graph.max(initial=-1)) + 1
    count = np.bincount(graph[first], minlength=num_graphs)
    for _ in range(_ROUNDS):
        word = _mix(colour.astype(np.uint64) + np.uint64(1))
        seen = into.sum(_mix(word[head] ^ forward)) + out_of.sum(_mix(word[tail] ^ inverse))
        # A node's own colour is part of the key, so classes are only ever divided.
        colour, first = _by_first(_mix(word + _mix(seen)))
        before, count = count, np.bincount(graph[first], minlength=num_graphs)
        if np.array_equal(before, count):
            break
    return colour, (before == count)[graph] if nodes else np.zeros(0, dtype=bool)


def _merge(
    head: np.ndarray, tail: np.ndarray, relation: np.ndarray, merged_node: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Merged fact of every fact, and the first fact of each."""
    classes = int(merged_node.max(initial=-1)) + 1
    ends = np.unique(merged_node[head] * classes + merged_node[tail], return_inverse=True)[1]
    return _by_first(ends * (int(relation.max(initial=-1)) + 1) + relation)


def merge_nodes(
    head: np.ndarray,
    tail: np.ndarray,
    relation: np.ndarray,
    graph: np.ndarray,
    mark: np.ndarray,
    *,
    merge: bool = True,
) -> MergedGraph:
    """Merges the nodes of each graph that cannot be told apart.

    Colours are hashes; the partition is checked to be equitable afterwards, so a collision, like an
    unsettled graph, costs speed and never exactness.

    Args:
        head, tail, relation: int [E], every fact once; node rows of all graphs end to end.
        graph: int [N] graph of each node, ascending; mark: bool [N] topic nodes.
        merge: False leaves every node its own class.

    Returns:
        The quotient.
    """
    nodes = len(graph)
    head, tail, relation = (x.astype(np.int64) for x in (head, tail, relation))
    own = np.arange(nodes, dtype=np.int64)
    colour, settled = (own, own >= 0) if not merge else _refine(head, tail, relation, graph, mark)
    while True:
        merged_node, first_node = _by_first(np.where(settled, colour, nodes + own))
        size = np.bincount(merged_node, minlength=len(first_node))
        row, first_fact = _merge(head, tail, relation, merged_node)
        number = np.bincount(row, minlength=len(first_fact))
        broken = np.zeros(int(graph.max(initial=-1)) + 1, dtype=bool)
        for node in (head, tail):
            at, times = np.unique(row * nodes + node, return_counts=True)
            at_row, at_node = np.divmod(at, max(nodes, 1))
            uneven = times * size[merged_node[at_node]] != number[at_row]
            broken[graph[at_node[uneven]]] = True
        if not broken.any():
            break
        settled = settled & ~broken[graph]
    head_class, tail_class = merged_node[head[first_fact]], merged_node[tail[first_fact]]
    columns = (
        merged_node,
        size,
        row,
        head_class,
        tail_class,
        relation[first_fact],
        number // size[head_class],
        number // size[tail_class],
    )
    return MergedGraph(*(column.astype(np.int32) for column in columns))
