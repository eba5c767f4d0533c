"""Steps over a graph equal a loop over its triples."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dragkit.data.build import walk as walk_module
from dragkit.data.build.graph import Graph
from dragkit.data.build.walk import Walk
from tests.data.build.graphs import cases, facts_of, step_counts


@given(cases(), st.integers(1, 30))
def test_steps_degrees_and_facts_equal_a_loop_over_the_triples(case: tuple, chunk: int) -> None:
    graph, topics, excluded = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk_module, "_CHUNK", chunk)
        walk = Walk(graph, excluded)
    nodes = np.array(sorted(set(topics)), dtype=np.int64)
    counts = step_counts(graph, excluded)
    assert walk.degree(nodes).tolist() == counts[nodes].sum(1).tolist()
    assert walk.matrix.toarray().tolist() == counts.tolist()
    reached, origin = walk.steps(nodes)
    expected = {
        (i, node): n
        for i, row in enumerate(nodes)
        for node, n in enumerate(counts[row].astype(int).tolist())
        if n
    }
    assert Counter(zip(origin.tolist(), reached.tolist(), strict=True)) == expected
    at_nodes = {i for i, h, t in facts_of(graph, excluded) if {h, t} & set(topics)}
    # Twice, so that the second call sees what the first one left.
    for _ in range(2):
        facts = walk.facts_at(nodes).tolist()
        assert (set(facts), len(facts)) == (at_nodes, len(at_nodes))


def test_no_nodes_have_no_steps() -> None:
    walk, nobody = Walk(Graph.from_triples([("a", "r", "b")])), np.zeros(0, dtype=np.int64)
    assert [len(array) for array in (*walk.steps(nobody), walk.facts_at(nobody))] == [0, 0, 0]


@pytest.mark.parametrize("row", [-1, 1])
def test_an_unknown_relation_is_refused(row: int) -> None:
    with pytest.raises(ValueError, match=f"excluded_relations: row {row}.* 1 relations"):
        Walk(Graph.from_triples([("a", "r", "b")]), [row])
