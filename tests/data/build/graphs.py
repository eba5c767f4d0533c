"""Small graphs and what a slow reading of their triples says about them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from hypothesis import strategies as st

from dragkit.data.build.graph import Graph

NAMES = [f"n{i}" for i in range(9)]
RELATIONS = ["r0", "r1", "r2"]

triples = st.lists(
    st.tuples(st.sampled_from(NAMES), st.sampled_from(RELATIONS), st.sampled_from(NAMES)),
    min_size=1,
    max_size=24,
    unique=True,
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Graph, list[int], tuple[int, ...]]:
    """A multigraph with loops, topics that may repeat, and excluded relations."""
    graph = Graph.from_triples(draw(triples))
    topics = st.lists(st.integers(0, graph.num_entities - 1), min_size=1, max_size=4)
    relations = st.integers(0, len(graph.relations) - 1)
    return graph, draw(topics), tuple(draw(st.sets(relations, max_size=2)))


def facts_of(graph: Graph, excluded: Collection[int] = ()) -> list[tuple[int, int, int]]:
    """(fact, head, tail) of the facts whose relation is not excluded."""
    rows = zip(graph.head.tolist(), graph.relation.tolist(), graph.tail.tolist(), strict=True)
    return [(i, h, t) for i, (h, r, t) in enumerate(rows) if r not in excluded]


def step_counts(graph: Graph, excluded: Collection[int] = ()) -> np.ndarray:
    """float64 [N, N] the number of ways to step from one node to another."""
    counts = np.zeros((graph.num_entities, graph.num_entities))
    for _, head, tail in facts_of(graph, excluded):
        counts[head, tail] += 1
        counts[tail, head] += 1
    return counts


def solved_pagerank(
    graph: Graph, topics: Sequence[int], restart: float, excluded: Collection[int] = ()
) -> np.ndarray:
    """float64 [N] PageRank as the solution of its linear equations."""
    counts = step_counts(graph, excluded)
    degree = counts.sum(0)
    # A node without facts steps to itself.
    counts[degree == 0, degree == 0] = 1
    moves = counts / np.maximum(degree, 1)
    source = np.zeros(graph.num_entities)
    source[list(set(topics))] = 1 / len(set(topics))
    return np.linalg.solve(np.eye(len(source)) - (1 - restart) * moves, restart * source)


def fact_ranks(
    graph: Graph, topics: Sequence[int], restart: float, excluded: Collection[int] = ()
) -> dict[int, float]:
    """The flow across each fact from both of its ends."""
    flow = solved_pagerank(graph, topics, restart, excluded)
    flow /= np.maximum(step_counts(graph, excluded).sum(0), 1)
    return {fact: flow[head] + flow[tail] for fact, head, tail in facts_of(graph, excluded)}
