"""Merged nodes: the coarsest partition, its counts, and graphs that are left as they are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dragkit.data import node_merging as module
from dragkit.data.node_merging import MergedGraph, merge_nodes


def merge(graphs: list[tuple[int, list[int], list[tuple]]], **options: bool) -> MergedGraph:
    """Of graphs given as (nodes, topics, facts)."""
    base = np.cumsum([0, *(nodes for nodes, _, _ in graphs)])
    mark = np.zeros(base[-1], dtype=bool)
    facts = []
    for (_, topics, triples), first in zip(graphs, base, strict=False):
        mark[[first + t for t in topics]] = True
        facts += [(first + h, r, first + t) for h, r, t in triples]
    head, relation, tail = np.array(facts, dtype=np.int32).reshape(-1, 3).T
    owner = np.repeat(np.arange(len(graphs)), np.diff(base))
    return merge_nodes(head, tail, relation, owner, mark, **options)


def test_leaves_of_a_hub_are_one_class() -> None:
    star = (6, [0], [(0, 7, v) for v in range(1, 5)] + [(5, 7, 0)])
    found = merge([star])
    assert found.merged_node.tolist() == [0, 1, 1, 1, 1, 2]
    assert found.node_count.tolist() == [1, 4, 1]
    assert found.merged_fact.tolist() == [0, 0, 0, 0, 1]
    assert (found.head.tolist(), found.tail.tolist()) == ([0, 2], [1, 0])
    assert found.head_count.tolist() == [4, 1]
    assert found.tail_count.tolist() == [1, 1]


def test_topics_relations_and_directions_keep_nodes_apart() -> None:
    facts = [(0, 1, 2), (1, 1, 2)]
    assert merge([(3, [], facts)]).node_count.tolist() == [2, 1]
    assert merge([(3, [0], facts)]).node_count.tolist() == [1, 1, 1]
    assert merge([(3, [], [(0, 1, 2), (1, 2, 2)])]).node_count.tolist() == [1, 1, 1]
    assert merge([(3, [], [(0, 1, 2), (2, 1, 1)])]).node_count.tolist() == [1, 1, 1]
    # Two facts between the same nodes are not one.
    parallel = merge([(4, [], [(0, 1, 2), (1, 1, 2), (1, 2, 2), (0, 1, 3)])])
    assert parallel.node_count.tolist() == [1, 1, 1, 1]


def test_a_cycle_is_a_node_with_a_loop() -> None:
    found = merge([(4, [], [(v, 0, (v + 1) % 4) for v in range(4)])])
    assert (found.head.tolist(), found.tail.tolist(), found.node_count.tolist()) == ([0], [0], [4])
    assert (found.head_count.tolist(), found.tail_count.tolist()) == ([1], [1])


def test_graphs_do_not_mix_and_may_be_empty() -> None:
    pair = (2, [0], [(0, 0, 1)])
    found = merge([(0, [], []), pair, (3, [], []), pair, (0, [], [])])
    assert found.merged_node.tolist() == [0, 1, 2, 2, 2, 3, 4]
    assert found.merged_fact.tolist() == [0, 1]
    nothing = merge([(0, [], [])])
    assert all(len(column) == 0 for column in nothing)
    assert merge([(3, [], [])], merge=False).node_count.tolist() == [1, 1, 1]


def test_a_graph_that_does_not_settle_is_left_as_it_is() -> None:
    chain = (90, [], [(v, 0, v + 1) for v in range(89)])
    hub = (4, [0], [(0, 0, v) for v in range(1, 4)])
    found = merge([hub, chain, hub])
    assert found.node_count.tolist() == [1, 3, *[1] * 90, 1, 3]


def test_a_collision_costs_no_exactness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes of two values only: the check finds it and leaves the graph alone."""
    monkeypatch.setattr(module, "_mix", lambda word: word & np.uint64(1))
    graph = (5, [0], [(0, 0, 1), (0, 0, 2), (1, 1, 3), (2, 0, 4)])
    assert merge([graph]).node_count.tolist() == [1] * 5


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_equals_slow_refinement(
    slow_classes: Callable[..., list[int]], data: st.DataObject
) -> None:
    graphs = []
    for _ in range(data.draw(st.integers(1, 4))):
        nodes = data.draw(st.integers(1, 9))
        node = st.integers(0, nodes - 1)
        facts = data.draw(st.lists(st.tuples(node, st.integers(0, 1), node), max_size=14))
        topics = data.draw(st.lists(node, max_size=2))
        graphs.append((nodes, sorted(set(topics)), sorted(set(facts))))
    found = merge(graphs)
    node = fact = 0
    for nodes, topics, facts in graphs:
        classes = slow_classes(range(nodes), topics, facts)
        mine = found.merged_node[node : node + nodes]
        assert (mine - (mine[0])).tolist() == classes
        size = np.bincount(classes)
        for place, (h, r, t) in enumerate(facts):
            row = found.merged_fact[fact + place]
            same = [
                (a, z)
                for a, q, z in facts
                if (classes[a], q, classes[z]) == (classes[h], r, classes[t])
            ]
            assert found.head[row] - mine[0] == classes[h]
            assert found.tail[row] - mine[0] == classes[t]
            assert found.relation[row] == r
            assert found.head_count[row] == sum(a == h for a, _ in same)
            assert found.tail_count[row] == sum(z == t for _, z in same)
            assert found.head_count[row] * size[classes[h]] == len(same)
        node, fact = node + nodes, fact + len(facts)
