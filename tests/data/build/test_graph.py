"""A knowledge graph as arrays."""

from __future__ import annotations

import random

import numpy as np

from dragkit.data.build.graph import Graph, find_name


def _triples(seed: int, count: int = 200) -> list[tuple[str, str, str]]:
    draw = random.Random(seed)
    names = [f"n{i}" for i in range(40)] + ["é", "Z", "z z"]
    return [(draw.choice(names), draw.choice("rst"), draw.choice(names)) for _ in range(count)]


def test_facts_are_distinct_and_sorted_and_found_from_both_ends() -> None:
    triples = _triples(0)
    graph = Graph.from_triples(triples)
    assert graph.triples(range(graph.num_facts)) == sorted(set(triples))
    for row in range(graph.num_entities):
        name = graph.entities[row]
        out = range(graph.head_ptr[row], graph.head_ptr[row + 1])
        into = graph.tail_order[graph.tail_ptr[row] : graph.tail_ptr[row + 1]]
        assert graph.triples(out) == sorted({t for t in triples if t[0] == name})
        assert sorted(graph.triples(into)) == sorted({t for t in triples if t[2] == name})
        assert graph.degree()[row] == len(out) + len(into)
    shuffled = Graph.from_triples(reversed(triples))
    np.testing.assert_array_equal(shuffled.tail_order, graph.tail_order)


def test_names_are_found() -> None:
    names = ["a", "b", "é"]
    assert [find_name(names, name) for name in ("a", "é", "", "c", "z")] == [0, 2, None, None, None]


def test_an_empty_graph() -> None:
    graph = Graph.from_triples([])
    assert (graph.num_entities, graph.num_facts, graph.triples([])) == (0, 0, [])
    assert find_name(graph.entities, "a") is None
