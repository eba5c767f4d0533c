"""PageRank by pushes and sweeps equals the solution of its equations."""

from __future__ import annotations

import math

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dragkit.data.build import pagerank
from dragkit.data.build.graph import Graph
from dragkit.data.build.pagerank import PageRank
from dragkit.data.build.walk import Walk
from tests.data.build.graphs import cases, facts_of, solved_pagerank, step_counts

# Share of the ends from which on sweeps replace pushes: always, as shipped, never.
FRACTIONS = (0.0, pagerank._SWEEP_FRACTION, math.inf)


def ranks_of(rank: PageRank, topics: list[int], tolerance: float = 1e-12) -> np.ndarray:
    """float64 [N] ranks, 0 where the walk did not come."""
    found = rank(topics, tolerance)
    assert len(set(found.nodes.tolist())) == len(found.nodes)
    ranks = np.zeros(rank.walk.num_nodes)
    ranks[found.nodes] = found.rank
    return ranks


@pytest.mark.parametrize("fraction", FRACTIONS)
@given(case=cases(), restart=st.floats(0.05, 0.95))
def test_it_solves_the_equations(fraction: float, case: tuple, restart: float) -> None:
    graph, topics, excluded = case
    rank = PageRank(Walk(graph, excluded), restart)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pagerank, "_SWEEP_FRACTION", fraction)
        found = ranks_of(rank, topics)
    expected = solved_pagerank(graph, topics, restart, excluded)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("fraction", FRACTIONS)
@given(case=cases(), tolerance=st.floats(1e-8, 0.3))
def test_the_error_is_within_the_tolerance(fraction: float, case: tuple, tolerance: float) -> None:
    graph, topics, excluded = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pagerank, "_SWEEP_FRACTION", fraction)
        found = ranks_of(PageRank(Walk(graph, excluded)), topics, tolerance)
    error = solved_pagerank(graph, topics, 0.25, excluded) - found
    bound = tolerance * step_counts(graph, excluded).sum(0) + 1e-12
    assert (np.abs(error) <= bound).all()
    if fraction == math.inf:
        assert (error >= -1e-12).all()


def test_it_is_the_pagerank_of_networkx() -> None:
    generator = np.random.default_rng(0)
    ends = generator.integers(0, 60, (400, 2))
    names = [(f"{h:02}", f"r{i % 3}", f"{t:02}") for i, (h, t) in enumerate(ends) if h != t]
    graph = Graph.from_triples(names)
    theirs = nx.MultiGraph([(h, t) for h, _, t in set(names)])
    personal = {graph.entities[row]: 1 for row in (3, 40)}
    expected = nx.pagerank(theirs, alpha=0.8, personalization=personal, tol=1e-14, max_iter=999)
    found = ranks_of(PageRank(Walk(graph), 0.2), [40, 3], 1e-13)
    assert found == pytest.approx([expected[name] for name in graph.entities], abs=1e-12)


@given(case=cases(), seed=st.integers(0, 999))
def test_names_do_not_matter(case: tuple, seed: int) -> None:
    graph, topics, _ = case
    order = np.random.default_rng(seed).permutation(graph.num_entities)
    triples = graph.triples(range(graph.num_facts))
    new_name = {name: f"m{order[row]}" for row, name in enumerate(graph.entities)}
    renamed = Graph.from_triples((new_name[h], r, new_name[t]) for h, r, t in triples)
    # Names of one digit sort as the numbers do.
    assert list(renamed.entities) == [f"m{row}" for row in range(graph.num_entities)]
    found = ranks_of(PageRank(Walk(renamed)), [int(order[t]) for t in topics])
    before = ranks_of(PageRank(Walk(graph)), topics)
    np.testing.assert_allclose(found[order], before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("fraction", FRACTIONS)
@given(case=cases(), others=st.lists(st.integers(0, 1), max_size=3))
def test_earlier_questions_leave_no_trace(fraction: float, case: tuple, others: list[int]) -> None:
    graph, topics, excluded = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pagerank, "_SWEEP_FRACTION", fraction)
        used, fresh = PageRank(Walk(graph, excluded)), PageRank(Walk(graph, excluded))
        for other in others:
            used([other % graph.num_entities], 1e-6)
        for ours, theirs in zip(used(topics, 1e-6), fresh(topics, 1e-6), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_component_keeps_its_mass_and_an_isolated_topic_its_own() -> None:
    graph = Graph.from_triples([("a", "r", "b"), ("c", "s", "c"), ("d", "r", "e")])
    found = ranks_of(PageRank(Walk(graph, [1])), [0, 2])
    # "c" has lost its only fact.
    assert found[2] == 0.5
    assert found[:2].sum() == pytest.approx(0.5, abs=1e-10)
    assert found[3:].tolist() == [0, 0]


def test_a_neighbourhood_costs_the_same_in_any_graph() -> None:
    chain = Graph.from_triples((f"{i:05}", "next", f"{i + 1:05}") for i in range(20_000))
    found = PageRank(Walk(chain))([10_000], 1e-6)
    # A step away, about a third of the rank is left.
    assert 20 < len(found.nodes) < 50


def test_a_topic_with_very_many_facts_still_spreads() -> None:
    star = Graph.from_triples(("hub", "r", f"leaf{i:03}") for i in range(300))
    found = ranks_of(PageRank(Walk(star)), [0], 0.1)
    assert found[0] > 0
    assert (found[1:] > 0).all()


def test_no_topic_has_no_ranks() -> None:
    found = PageRank(Walk(Graph.from_triples([("a", "r", "b")])))([], 1e-6)
    assert [len(array) for array in found] == [0, 0, 0, 0]


@pytest.mark.parametrize("fraction", FRACTIONS)
@given(case=cases(), budget=st.integers(1, 26), tolerance=st.floats(1e-3, 1))
def test_a_budget_has_an_error_relative_to_its_last_fact(
    fraction: float, case: tuple, budget: int, tolerance: float
) -> None:
    graph, topics, excluded = case
    rank = PageRank(Walk(graph, excluded))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pagerank, "_SWEEP_FRACTION", fraction)
        ranks = rank.for_budget(topics, budget, tolerance)
    exact = solved_pagerank(graph, topics, 0.25, excluded)
    counts, found = step_counts(graph, excluded), np.zeros(graph.num_entities)
    found[ranks.nodes] = ranks.rank
    flow = exact / np.maximum(counts.sum(0), 1)
    facts = [flow[h] + flow[t] for _, h, t in facts_of(graph, excluded)]
    last = sorted(filter(None, facts), reverse=True)[budget - 1 :][:1]
    if last:
        assert (np.abs(exact - found) <= tolerance * last[0] * counts.sum(0) + 1e-12).all()
    else:
        # There are fewer facts around the topics, and all of them are found.
        assert set(np.flatnonzero(exact > 1e-12)) <= set(ranks.nodes[ranks.is_pushed].tolist())


@pytest.mark.parametrize("tolerance", [0.01, 0.002])
@pytest.mark.parametrize("budget", [3, 30, 300])
def test_a_budget_costs_as_much_as_its_tolerance_asks_for(
    budget: int, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pagerank, "_SWEEP_FRACTION", math.inf)
    generator = np.random.default_rng(3)
    ends = (20_000 * generator.random((60_000, 2)) ** 2).astype(int)
    graph = Graph.from_triples((f"{h:05}", "r", f"{t:05}") for h, t in ends)
    rank = PageRank(Walk(graph))
    exact, found = (np.zeros(graph.num_entities) for _ in range(2))
    precise, ranks = rank([77], 1e-14), rank.for_budget([77], budget, tolerance)
    exact[precise.nodes], found[ranks.nodes] = precise.rank, ranks.rank
    degree = graph.degree()
    last = np.sort((exact / degree)[graph.head] + (exact / degree)[graph.tail])[-budget]
    error = (np.abs(exact - found) / degree).max()
    assert tolerance * last / 9 < error <= tolerance * last


def test_a_small_graph_is_as_exact_as_a_large_one() -> None:
    graph = Graph.from_triples([("a", "r", "b"), ("b", "r", "c"), ("c", "r", "d")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pagerank, "_SWEEP_FRACTION", math.inf)
        ranks = PageRank(Walk(graph)).for_budget([0], 1, 1e-5)
    exact = solved_pagerank(graph, [0], 0.25)
    assert ranks.is_pushed.all()
    np.testing.assert_allclose(ranks.rank, exact[ranks.nodes], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("restart", "tolerance", "topics", "message"),
    [
        (0.0, 0.1, [0], "restart is 0.0, but has to be above 0 and below 1"),
        (1.0, 0.1, [0], "restart is 1.0"),
        (math.nan, 0.1, [0], "restart is nan"),
        (0.5, 0.0, [0], "tolerance is 0.0, but has to be from 1e-14 to 1"),
        (0.5, 1.5, [0], "tolerance is 1.5"),
        (0.5, 0.1, [2], "topics: row 2, but the graph has 2 entities"),
        (0.5, 0.1, [-1], "topics: row -1"),
    ],
)
def test_what_is_out_of_range_is_refused(
    restart: float, tolerance: float, topics: list[int], message: str
) -> None:
    walk = Walk(Graph.from_triples([("a", "r", "b")]))
    with pytest.raises(ValueError, match=message):
        PageRank(walk, restart)(topics, tolerance)
