"""Cutting the subgraphs of questions from a knowledge graph."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from scipy.sparse import csr_array, diags_array, eye_array
from scipy.sparse.linalg import bicgstab

from bench.data import DATA
from bench.measure import Contender
from bench.results import Comparison
from dragkit.data.build.cut import CutOptions, cut_subgraphs
from dragkit.data.build.graph import Graph
from dragkit.data.build.pagerank import PageRank
from dragkit.data.build.walk import Walk

RESTART = 0.25
QUESTIONS = 4
# Contenders differ from one another by less than this at every node.
AGREEMENT = 1e-9


def power_law_graph(num_facts: int) -> Graph:
    """A synthetic graph of about `num_facts` facts, three for each entity, with hubs."""
    generator = np.random.default_rng(0)
    num_entities, num_relations = num_facts // 3, 100
    head, tail = (num_entities * generator.random((2, num_facts)) ** 3).astype(np.int64)
    relation = generator.integers(0, num_relations, num_facts)
    keys = np.unique((head * num_relations + relation) * num_entities + tail)
    pairs, tail = np.divmod(keys, num_entities)
    columns = (*np.divmod(pairs, num_relations), tail)
    names = [f"{row:09}" for row in range(num_entities)]
    relations = [f"r{row:02}" for row in range(num_relations)]
    return Graph.from_arrays(names, relations, *(column.astype(np.int32) for column in columns))


def named_graph(name: str) -> tuple[Graph, str]:
    """The published graph `name`, or a synthetic one of its size, and what it is."""
    path = Path(os.environ.get("DRAGKIT_DATA", DATA)) / "kb" / f"{name}.tsv.gz"
    if not path.is_file():
        return power_law_graph(150_000), "synthetic"
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        return Graph.from_triples(tuple(line.rstrip("\n").split("\t")) for line in file), name


def some_topics(graph: Graph) -> list[list[int]]:
    """One or two topics for each question, of those with at least five facts."""
    generator = np.random.default_rng(0)
    rows = generator.choice(np.flatnonzero(graph.degree() >= 5), (QUESTIONS, 2), replace=False)
    return [row[: 1 + i % 2] for i, row in enumerate(rows.tolist())]


class Ours:
    """PageRank as the builder computes it. Arrays that all questions share are prepared."""

    def __init__(self, graph: Graph) -> None:
        self.rank = PageRank(Walk(graph), RESTART)

    def __call__(self, topics: list[int]) -> np.ndarray:
        """Returns float64 [N]."""
        found = self.rank(topics, 1e-12)
        ranks = np.zeros(self.rank.walk.num_nodes)
        ranks[found.nodes] = found.rank
        return ranks


class Networkx:
    """`networkx.pagerank` with a personalization. The graph is prepared."""

    def __init__(self, graph: Graph) -> None:
        self.graph = nx.MultiGraph()
        self.graph.add_nodes_from(range(graph.num_entities))
        edges = list(zip(graph.head.tolist(), graph.tail.tolist(), strict=True))
        # networkx counts an undirected loop once, and a loop has two ends.
        self.graph.add_edges_from([*edges, *((h, t) for h, t in edges if h == t)])

    def __call__(self, topics: list[int]) -> np.ndarray:
        """Returns float64 [N]."""
        personal, tolerance = dict.fromkeys(topics, 1), 1e-11 / len(self.graph)
        ranks = nx.pagerank(self.graph, 1 - RESTART, personal, max_iter=999, tol=tolerance)
        return np.array([ranks[row] for row in range(len(ranks))])


class Scipy:
    """One sparse solve of the equations for each question. The matrix is prepared.

    The direct solver `spsolve` is no contender, as the factors of such graphs fill in: one question
    took 172 s on the graph of MetaQA.
    """

    def __init__(self, graph: Graph) -> None:
        shape = (graph.num_entities, graph.num_entities)
        forward = csr_array((np.ones(graph.num_facts), (graph.head, graph.tail)), shape=shape)
        degree = np.maximum(graph.degree(), 1)
        moves = (forward + forward.T) @ diags_array(1 / degree)
        self.matrix = csr_array(eye_array(len(degree)) - (1 - RESTART) * moves)

    def __call__(self, topics: list[int]) -> np.ndarray:
        """Returns float64 [N]."""
        source = np.zeros(self.matrix.shape[0])
        source[topics] = RESTART / len(topics)
        ranks, failed = bicgstab(self.matrix, source, rtol=1e-10)
        assert not failed
        return ranks


@pytest.mark.parametrize("name", ["freebase_pool", pytest.param("metaqa", marks=pytest.mark.full)])
def test_cutting(name: str, timed: Callable[..., None]) -> None:
    """PageRank of some questions within 1e-9 by all, and our cut at its default tolerance."""
    graph, source = named_graph(name)
    topics, options = some_topics(graph), CutOptions(restart=RESTART)
    ours, networkx, scipy = Ours(graph), Networkx(graph), Scipy(graph)
    for rows in topics:
        for peer in (networkx, scipy):
            error = np.abs(ours(rows) - peer(rows)).max()
            assert error < AGREEMENT, f"{type(peer).__name__} differs by {error}"
    contenders = [
        Contender("PageRank within 1e-9", lambda: [ours(t) for t in topics], peer=False),
        Contender(
            f"cut of {options.max_facts} facts",
            lambda: cut_subgraphs(graph, topics, options),
            peer=False,
        ),
        Contender("networkx.pagerank", lambda: [networkx(t) for t in topics]),
        Contender("scipy bicgstab", lambda: [scipy(t) for t in topics]),
    ]
    about = {"graph": source, "facts": graph.num_facts, "entities": graph.num_entities}
    timed(Comparison(f"cut, {source}", about, [], questions=QUESTIONS), contenders)


@pytest.mark.full
def test_cutting_from_graphs_of_growing_size(timed: Callable[..., None]) -> None:
    """Milliseconds of a question depend on its neighbourhood, and little on the graph."""
    contenders = []
    for num_facts in (10**5, 10**6, 10**7):
        graph = power_law_graph(num_facts)
        topics = some_topics(graph)
        contenders.append(
            Contender(
                f"{num_facts:,} facts",
                lambda graph=graph, topics=topics: cut_subgraphs(graph, topics, CutOptions()),
                peer=False,
            )
        )
    about = {"graph": "synthetic", "budget": CutOptions().max_facts}
    timed(Comparison("cut, growing graph", about, [], questions=QUESTIONS), contenders)
