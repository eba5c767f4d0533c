"""Merges nodes that the retriever cannot tell apart: the coarsest equitable partition.

Two nodes are merged if they agree on being a topic and if their facts lead, for each relation and
direction, to equal numbers of nodes of every merged node. Their states are then equal in every
layer, because a state depends only on the node's previous state and on the sum over its facts.
Colour refinement finds the partition (Weisfeiler and Leman, 1968; Cardon and Crochemore, 1982).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Each round separates nodes that first differ one hop further away. A graph that is not stable
# after all rounds, such as a long chain, is not merged.
_MAX_ROUNDS = 32

_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))

# Keeps the words of relations apart from those of colours: the XOR of equal words is 0.
_RELATION_OFFSET = np.uint64(1 << 62)


class MergedGraph(NamedTuple):
    """Graphs laid end to end after merging: N nodes become M, E facts become Q.

    Merged nodes and merged facts are numbered by their first member, so those of one graph are
    contiguous.

    Attributes:
        merged_node: int32 [N] merged node of every node.
        node_count: int32 [M] nodes that each merged node stands for.
        merged_fact: int32 [E] merged fact of every fact.
        head, tail: int32 [Q] merged nodes at the ends of every merged fact.
        relation: int32 [Q] relation of every merged fact.
        head_count: int32 [Q] member facts that start at any one node of the head.
        tail_count: int32 [Q] member facts that end at any one node of the tail.
    """

    merged_node: np.ndarray
    node_count: np.ndarray
    merged_fact: np.ndarray
    head: np.ndarray
    tail: np.ndarray
    relation: np.ndarray
    head_count: np.ndarray
    tail_count: np.ndarray


def _mix(word: np.ndarray) -> np.ndarray:
    """Hashes 64-bit words with a bijection (Stafford's variant 13 of the MurmurHash3 finaliser)."""
    word = (word ^ (word >> np.uint64(30))) * _MIX[0]
    word = (word ^ (word >> np.uint64(27))) * _MIX[1]
    return word ^ (word >> np.uint64(31))


def _number_by_first(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers the distinct keys by first occurrence: the number of each key, the first of each."""
    if not len(key):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    order = np.argsort(key)
    is_new = np.append(True, key[order[1:]] != key[order[:-1]])
    # Any order of equal keys will do, because the first is the least. It is several times faster.
    first = np.minimum.reduceat(order, np.flatnonzero(is_new))
    is_first = np.zeros(len(key), dtype=bool)
    is_first[first] = True
    number = (np.cumsum(is_first) - 1)[first]
    numbers = np.empty(len(key), dtype=np.int64)
    numbers[order] = number[np.cumsum(is_new) - 1]
    return numbers, np.flatnonzero(is_first)


def _sum_at(node: np.ndarray, word: np.ndarray, num_nodes: int) -> np.ndarray:
    """Sums the words of the facts at every node, uint64 [N]. 64-bit sums wrap, in any order."""
    total = np.zeros(num_nodes, dtype=np.uint64)
    np.add.at(total, node, word)
    return total


def _refine_colours(
    head: np.ndarray, tail: np.ndarray, relation: np.ndarray, graph: np.ndarray, topic: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the colour of every node, and bool [N] whether its graph's colours are stable."""
    num_nodes, num_graphs = len(graph), int(graph.max(initial=-1)) + 1
    salt = relation.astype(np.uint64) * np.uint64(2) + _RELATION_OFFSET
    forward, inverse = _mix(salt), _mix(salt + np.uint64(1))
    colour, first = _number_by_first(2 * graph.astype(np.int64) + topic)
    num_colours = np.bincount(graph[first], minlength=num_graphs)
    for _ in range(_MAX_ROUNDS):
        word = _mix(colour.astype(np.uint64) + np.uint64(1))
        neighbours = _sum_at(tail, _mix(word[head] ^ forward), num_nodes)
        neighbours += _sum_at(head, _mix(word[tail] ^ inverse), num_nodes)
        # The node's own colour is part of the key, so a round can only split colours.
        colour, first = _number_by_first(_mix(word + _mix(neighbours)))
        previous, num_colours = num_colours, np.bincount(graph[first], minlength=num_graphs)
        if np.array_equal(previous, num_colours):
            break
    return colour, (previous == num_colours)[graph] if num_nodes else np.zeros(0, dtype=bool)


def _merge_facts(
    head: np.ndarray, tail: np.ndarray, relation: np.ndarray, merged_node: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the merged fact of every fact, and the first fact of each merged fact."""
    num_merged = int(merged_node.max(initial=-1)) + 1
    num_relations = int(relation.max(initial=-1)) + 1
    ends = merged_node[head] * num_merged + merged_node[tail]
    if num_merged * num_merged * num_relations >= 2**63:
        ends = np.unique(ends, return_inverse=True)[1]
    return _number_by_first(ends * num_relations + relation)


def merge_nodes(
    head: np.ndarray,
    tail: np.ndarray,
    relation: np.ndarray,
    graph: np.ndarray,
    topic: np.ndarray,
    *,
    merge: bool = True,
) -> MergedGraph:
    """Merges the nodes of each graph that the retriever cannot tell apart.

    Colours are hashes, so the partition is checked afterwards. A graph with a hash collision, like
    one without stable colours, is not merged: it costs time, never exactness.

    Args:
        head, tail: int [E] node rows, all graphs end to end.
        relation: int [E]. Every (head, relation, tail) occurs once.
        graph: int [N] graph of each node, ascending.
        topic: bool [N] topic nodes.
        merge: False keeps every node apart.
    """
    num_nodes = len(graph)
    head, tail, relation = (x.astype(np.int64) for x in (head, tail, relation))
    identity = np.arange(num_nodes, dtype=np.int64)
    colour, mergeable = identity, np.ones(num_nodes, dtype=bool)
    if merge:
        colour, mergeable = _refine_colours(head, tail, relation, graph, topic)
    while True:
        merged_node, first_node = _number_by_first(
            np.where(mergeable, colour, num_nodes + identity)
        )
        node_count = np.bincount(merged_node, minlength=len(first_node))
        merged_fact, first_fact = _merge_facts(head, tail, relation, merged_node)
        num_members = np.bincount(merged_fact, minlength=len(first_fact))
        # Equitable: every node at an end of a merged fact has the same number of its members.
        inexact = np.zeros(int(graph.max(initial=-1)) + 1, dtype=bool)
        for end in (head, tail):
            key, count = np.unique(merged_fact * num_nodes + end, return_counts=True)
            fact, node = np.divmod(key, max(num_nodes, 1))
            unequal = count * node_count[merged_node[node]] != num_members[fact]
            inexact[graph[node[unequal]]] = True
        if not inexact.any():
            break
        mergeable = mergeable & ~inexact[graph]
    merged_head, merged_tail = merged_node[head[first_fact]], merged_node[tail[first_fact]]
    columns = (
        merged_node,
        node_count,
        merged_fact,
        merged_head,
        merged_tail,
        relation[first_fact],
        num_members // node_count[merged_head],
        num_members // node_count[merged_tail],
    )
    return MergedGraph(*(column.astype(np.int32) for column in columns))
