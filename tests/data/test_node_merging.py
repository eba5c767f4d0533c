"""Merged nodes: the coarsest partition, its counts, and graphs that are not merged."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dragkit.data import node_merging
from dragkit.data.node_merging import MergedGraph, merge_nodes


def merge(graphs: list[tuple[int, list[int], list[tuple]]], **options: bool) -> MergedGraph:
    """Merges graphs given as (num_nodes, topics, facts)."""
    ptr = np.cumsum([0, *(num_nodes for num_nodes, _, _ in graphs)])
    topic = np.zeros(ptr[-1], dtype=bool)
    facts = []
    for (_, topics, triples), start in zip(graphs, ptr, strict=False):
        topic[[start + t for t in topics]] = True
        facts += [(start + h, r, start + t) for h, r, t in triples]
    head, relation, tail = np.array(facts, dtype=np.int32).reshape(-1, 3).T
    graph = np.repeat(np.arange(len(graphs)), np.diff(ptr))
    return merge_nodes(head, tail, relation, graph, topic, **options)


def test_leaves_of_a_hub_merge_into_one() -> None:
    star = (6, [0], [(0, 7, v) for v in range(1, 5)] + [(5, 7, 0)])
    merged = merge([star])
    assert merged.merged_node.tolist() == [0, 1, 1, 1, 1, 2]
    assert merged.node_count.tolist() == [1, 4, 1]
    assert merged.merged_fact.tolist() == [0, 0, 0, 0, 1]
    assert (merged.head.tolist(), merged.tail.tolist()) == ([0, 2], [1, 0])
    assert merged.head_count.tolist() == [4, 1]
    assert merged.tail_count.tolist() == [1, 1]


def test_topics_relations_and_directions_keep_nodes_apart() -> None:
    facts = [(0, 1, 2), (1, 1, 2)]
    assert merge([(3, [], facts)]).node_count.tolist() == [2, 1]
    assert merge([(3, [0], facts)]).node_count.tolist() == [1, 1, 1]
    assert merge([(3, [], [(0, 1, 2), (1, 2, 2)])]).node_count.tolist() == [1, 1, 1]
    assert merge([(3, [], [(0, 1, 2), (2, 1, 1)])]).node_count.tolist() == [1, 1, 1]
    # Two facts between the same nodes are not one.
    parallel = merge([(4, [], [(0, 1, 2), (1, 1, 2), (1, 2, 2), (0, 1, 3)])])
    assert parallel.node_count.tolist() == [1, 1, 1, 1]


def test_a_cycle_merges_into_a_node_with_a_self_loop() -> None:
    merged = merge([(4, [], [(v, 0, (v + 1) % 4) for v in range(4)])])
    assert (merged.head.tolist(), merged.tail.tolist(), merged.node_count.tolist()) == (
        [0],
        [0],
        [4],
    )
    assert (merged.head_count.tolist(), merged.tail_count.tolist()) == ([1], [1])


def test_graphs_do_not_mix_and_may_be_empty() -> None:
    pair = (2, [0], [(0, 0, 1)])
    merged = merge([(0, [], []), pair, (3, [], []), pair, (0, [], [])])
    assert merged.merged_node.tolist() == [0, 1, 2, 2, 2, 3, 4]
    assert merged.merged_fact.tolist() == [0, 1]
    nothing = merge([(0, [], [])])
    assert all(len(column) == 0 for column in nothing)
    assert merge([(3, [], [])], merge=False).node_count.tolist() == [1, 1, 1]


def test_a_graph_without_stable_colours_is_not_merged() -> None:
    chain = (90, [], [(v, 0, v + 1) for v in range(89)])
    hub = (4, [0], [(0, 0, v) for v in range(1, 4)])
    merged = merge([hub, chain, hub])
    assert merged.node_count.tolist() == [1, 3, *[1] * 90, 1, 3]


def test_a_graph_with_a_hash_collision_is_not_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """With hashes of one bit the partition is not equitable, which the check detects."""
    monkeypatch.setattr(node_merging, "_mix", lambda word: word & np.uint64(1))
    graph = (5, [0], [(0, 0, 1), (0, 0, 2), (1, 1, 3), (2, 0, 4)])
    assert merge([graph]).node_count.tolist() == [1] * 5


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_equals_slow_refinement(
    slow_merged_nodes: Callable[..., list[int]], data: st.DataObject
) -> None:
    graphs = []
    for _ in range(data.draw(st.integers(1, 4))):
        num_nodes = data.draw(st.integers(1, 9))
        node = st.integers(0, num_nodes - 1)
        facts = data.draw(st.lists(st.tuples(node, st.integers(0, 1), node), max_size=14))
        topics = data.draw(st.lists(node, max_size=2))
        graphs.append((num_nodes, sorted(set(topics)), sorted(set(facts))))
    merged = merge(graphs)
    first_node = first_fact = 0
    for num_nodes, topics, facts in graphs:
        expected = slow_merged_nodes(range(num_nodes), topics, facts)
        merged_node = merged.merged_node[first_node : first_node + num_nodes]
        base = merged_node[0]
        assert (merged_node - base).tolist() == expected
        node_count = np.bincount(expected)
        for index, (h, r, t) in enumerate(facts):
            row = merged.merged_fact[first_fact + index]
            key = (expected[h], r, expected[t])
            members = [(a, z) for a, q, z in facts if (expected[a], q, expected[z]) == key]
            assert (merged.head[row] - base, merged.relation[row], merged.tail[row] - base) == key
            assert merged.head_count[row] == sum(a == h for a, _ in members)
            assert merged.tail_count[row] == sum(z == t for _, z in members)
            assert merged.head_count[row] * node_count[expected[h]] == len(members)
        first_node, first_fact = first_node + num_nodes, first_fact + len(facts)
