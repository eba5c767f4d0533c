"""Cut subgraphs equal a slow choice by the solved ranks or by a search in breadth."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dragkit.data.build import pagerank
from dragkit.data.build.cut import CutMethod, CutOptions, Cutter, cut_subgraphs
from dragkit.data.build.graph import Graph
from tests.data.build.graphs import cases, fact_ranks, facts_of

METHODS = ("pagerank", "hops")


def hops_of(graph: Graph, topics: list[int], excluded: tuple[int, ...]) -> dict[int, int]:
    """The hop in which each fact is found, where it is found."""
    facts, near, hops = facts_of(graph, excluded), set(topics), {}
    while new := [(i, h, t) for i, h, t in facts if i not in hops and {h, t} & near]:
        hop = 1 + max(hops.values(), default=0)
        hops |= {i: hop for i, _, _ in new}
        near |= {node for _, h, t in new for node in (h, t)}
    return hops


def real_graph(folder: Path, name: str) -> Graph:
    """One of the published graphs."""
    import gzip

    with gzip.open(folder / "kb" / f"{name}.tsv.gz", "rt", encoding="utf-8", newline="\n") as file:
        return Graph.from_triples(tuple(line.rstrip("\n").split("\t")) for line in file)


@pytest.mark.parametrize("method", METHODS)
@given(case=cases(), budget=st.integers(1, 26), max_hops=st.integers(1, 3))
def test_the_best_facts_are_taken(
    method: CutMethod, case: tuple, budget: int, max_hops: int
) -> None:
    graph, topics, excluded = case
    options = CutOptions(method, budget, max_hops, 0.3, 1e-9, excluded)
    (cut,) = cut_subgraphs(graph, [topics], options)
    assert cut.dtype == np.int32
    assert (np.diff(cut) > 0).all()
    ranks, hops = fact_ranks(graph, topics, 0.3, excluded), hops_of(graph, topics, excluded)
    if method == "hops":
        hops = {fact: hop for fact, hop in hops.items() if hop <= max_hops}
    allowed = set(hops)
    # The nearest first, in bands so wide that no rank crosses them.
    value = {f: ranks[f] - (10 * hops[f] if method == "hops" else 0) for f in allowed}
    taken = set(cut.tolist())
    assert taken <= allowed
    at_topic = [
        {i for i, h, t in facts_of(graph, excluded) if topic in (h, t)} for topic in set(topics)
    ]
    for facts in filter(None, at_topic):
        assert max(map(value.get, taken & facts)) >= max(map(value.get, facts)) - 1e-6
    least_budget = len([facts for facts in at_topic if facts])
    assert min(budget, len(allowed)) <= len(taken) <= max(budget, least_budget)
    # A topic's fact can displace at most one better fact.
    best = sorted(value.values(), reverse=True)[: max(len(taken) - least_budget, 0)]
    got = sorted(map(value.get, taken), reverse=True)
    assert all(g >= b - 1e-6 for g, b in zip(got, best, strict=False))


def dense_choice(graph: Graph, topics: list[int], budget: int) -> list[int]:
    """The facts of highest rank, of which equal ones in the order of rows."""
    ranks = fact_ranks(graph, topics, 0.25)
    return sorted(sorted(ranks, key=lambda fact: (-np.float32(ranks[fact]), fact))[:budget])


@pytest.mark.parametrize("budget", [1, 7, 40, 399, 400, 401])
def test_one_topic_in_a_graph_of_hubs(budget: int) -> None:
    generator = np.random.default_rng(1)
    facts: set[tuple[str, str, str]] = set()
    while len(facts) < 400:
        # Some nodes have many facts, and most have few.
        head, tail = (int(60 * x**3) for x in generator.random(2))
        facts.add((f"{head:02}", f"r{generator.integers(3)}", f"{tail:02}"))
    graph = Graph.from_triples(facts)
    for topic in (0, 5, 31):
        (cut,) = cut_subgraphs(graph, [[topic]], CutOptions(max_facts=budget, tolerance=1e-9))
        reachable = hops_of(graph, [topic], ())
        assert cut.tolist() == [f for f in dense_choice(graph, [topic], budget) if f in reachable]


@pytest.mark.parametrize("fraction", [0.0, 9.0])
def test_of_equal_facts_the_first_rows_are_taken(
    fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pagerank, "_SWEEP_FRACTION", fraction)
    star = Graph.from_triples(("hub", "r", f"leaf{i}") for i in range(9))
    for method in METHODS:
        (cut,) = cut_subgraphs(star, [[0]], CutOptions(method, max_facts=4))
        assert cut.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("fraction", [0.0, 9.0])
def test_rounding_does_not_order_equal_facts(
    fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pagerank, "_SWEEP_FRACTION", fraction)
    facts = [("t", "r", inner) for inner in "vwxyz"]
    facts += [(inner, "r", f"{inner}{i}") for n, inner in enumerate("vwxyz") for i in range(n)]
    # Each of these hears from the five, but sums up in an order of its own.
    for i in range(32):
        ends = [(f"A{i:02}", inner) for inner in "vwxyz"]
        facts += [(h, "r", t) if i >> k & 1 else (t, "r", h) for k, (h, t) in enumerate(ends)]
    graph = Graph.from_triples(facts)
    topic = graph.entities.index("t")
    for budget in range(1, graph.num_facts, 6):
        options = CutOptions(max_facts=budget, tolerance=1e-9)
        (cut,) = cut_subgraphs(graph, [[topic]], options)
        assert cut.tolist() == dense_choice(graph, [topic], budget)


def test_parallel_facts_do_not_hide_others_from_the_budget() -> None:
    parallel = [("a", f"r{i}", "b") for i in range(10)]
    graph = Graph.from_triples(
        [*parallel, ("b", "s", "c"), *(("c", "s", f"d{i}") for i in "123456")]
    )
    for budget in range(1, 18):
        (cut,) = cut_subgraphs(graph, [[0]], CutOptions(max_facts=budget, tolerance=1e-9))
        assert cut.tolist() == dense_choice(graph, [0], budget)


def test_the_ranks_of_an_earlier_question_are_gone() -> None:
    near = [("t", "r", f"l{i}") for i in range(4)]
    near += [(f"l{i}", "r", f"m{i}{j}") for i in range(4) for j in range(5)]
    far = [("hub", "r", f"x{i}") for i in range(10_000)]
    graph = Graph.from_triples([*near, ("t", "r", "hub"), *far])
    cutter = Cutter(graph, CutOptions("hops", max_facts=10))
    before = cutter([graph.entities.index("t")])
    # The first question ranks a fact that the other one finds, and does not rank.
    cutter([graph.entities.index("x9999")])
    np.testing.assert_array_equal(cutter([graph.entities.index("t")]), before)


def test_every_topic_keeps_a_fact_under_any_budget() -> None:
    triples = [("a", "r", f"x{i}") for i in range(3)] + [("b", "r", f"y{i}") for i in range(30)]
    graph = Graph.from_triples([*triples, ("c", "r", "c"), ("d", "s", "e")])
    topics = [graph.entities.index(name) for name in "abcd"]
    for method in METHODS:
        options = CutOptions(method, max_facts=1, excluded_relations=(1,))
        (cut,) = cut_subgraphs(graph, [topics], options)
        # "d" has only an excluded fact.
        assert [head for head, _, _ in graph.triples(cut)] == ["a", "b", "c"]


@pytest.mark.parametrize("method", METHODS)
def test_without_a_fact_at_a_topic_the_graph_is_empty(method: CutMethod) -> None:
    graph = Graph.from_triples([("a", "r", "b"), ("c", "s", "d")])
    options = CutOptions(method, excluded_relations=(1,))
    empty, also_empty, whole = cut_subgraphs(graph, [[], [2], [0]], options)
    assert [len(empty), len(also_empty), whole.tolist()] == [0, 0, [0]]
    assert empty.dtype == also_empty.dtype == np.int32


@pytest.mark.parametrize("method", METHODS)
def test_a_graph_without_facts_has_empty_subgraphs(method: CutMethod) -> None:
    (cut,) = cut_subgraphs(Graph.from_triples([]), [[]], CutOptions(method))
    assert len(cut) == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_beyond_the_component_takes_all_of_it(method: CutMethod) -> None:
    # A third of the rank is left after each step, so that the far end has nearly none.
    facts = [(f"a{i:02}", "r", f"a{i + 1:02}") for i in range(25)]
    graph = Graph.from_triples([*facts, *((f"b{i}", "r", f"b{i % 7}") for i in range(99))])
    (cut,) = cut_subgraphs(graph, [[0]], CutOptions(method, max_facts=10**6, hops=10**9))
    assert cut.tolist() == list(range(25))


def random_questions() -> tuple[Graph, list[list[int]]]:
    """A graph of 3,000 facts with hubs, and 40 questions of one to three topics."""
    generator = np.random.default_rng(2)
    ends = (800 * generator.random((3000, 2)) ** 3).astype(int)
    graph = Graph.from_triples((f"{h:03}", f"r{i % 7}", f"{t:03}") for i, (h, t) in enumerate(ends))
    rows = generator.integers(0, graph.num_entities, (40, 3)).tolist()
    return graph, [row[: 1 + i % 3] for i, row in enumerate(rows)]


@pytest.mark.parametrize("method", METHODS)
def test_batches_orders_and_processes_change_nothing(method: CutMethod) -> None:
    graph, topics = random_questions()
    options = CutOptions(method, max_facts=90, tolerance=0.1, excluded_relations=(2,))
    together = cut_subgraphs(graph, topics, options)
    alone = [cut_subgraphs(graph, [rows], options)[0] for rows in topics]
    backwards = cut_subgraphs(graph, topics[::-1], options)[::-1]
    turned = cut_subgraphs(graph, [rows[::-1] * 2 for rows in topics], options)
    cut_part = partial(cut_subgraphs, graph, options=options)
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        parts = sum(pool.map(cut_part, (topics[:7], topics[7:])), [])
    for cuts in (alone, backwards, turned, parts):
        for ours, expected in zip(cuts, together, strict=True):
            np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "random"}, "method is 'random', but has to be 'pagerank' or 'hops'"),
        ({"max_facts": 0}, "max_facts is 0, but has to be at least 1"),
        ({"max_facts": -5}, "max_facts is -5"),
        ({"hops": 0}, "hops is 0"),
        ({"restart": 1.0}, "restart is 1.0, but has to be above 0 and below 1"),
        ({"tolerance": 0.0}, "tolerance is 0.0, but has to be above 0"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CutOptions(**options)


@pytest.mark.parametrize("method", METHODS)
def test_unknown_topics_are_refused_and_leave_no_trace(method: CutMethod) -> None:
    graph = Graph.from_triples([("a", "r", "b"), ("b", "r", "c")])
    cutter = Cutter(graph, CutOptions(method))
    with pytest.raises(ValueError, match="topics: row 7, but the graph has 3 entities"):
        cutter([0, 7])
    assert cutter([0]).tolist() == [0, 1]


@pytest.mark.parametrize("name", ["metaqa", "freebase_pool"])
def test_the_default_tolerance_finds_the_best_facts_of_real_graphs(
    kgqa_data: Path, name: str
) -> None:
    graph = real_graph(kgqa_data, name)
    generator = np.random.default_rng(0)
    topics = [[int(row)] for row in generator.choice(graph.num_entities, 12, replace=False)]
    shares = []
    for budget in (50, 500, 2000):
        exact = cut_subgraphs(graph, topics, CutOptions(max_facts=budget, tolerance=1e-7))
        found = cut_subgraphs(graph, topics, CutOptions(max_facts=budget))
        pairs = zip(exact, found, strict=True)
        shares.append(np.mean([np.isin(a, b).mean() for a, b in pairs]))
    # Measured: 0.99 and more.
    assert min(shares) > 0.98


def test_a_mapped_graph_gives_the_same(tmp_path: Path) -> None:
    graph, topics = random_questions()
    arrays = ("head", "relation", "tail", "head_ptr", "tail_order", "tail_ptr")
    for name in arrays:
        np.save(tmp_path / f"{name}.npy", getattr(graph, name))
    mapped = {name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in arrays}
    options = CutOptions(max_facts=50, excluded_relations=(0,))
    ours = cut_subgraphs(Graph(graph.entities, graph.relations, **mapped), topics, options)
    for cut, expected in zip(ours, cut_subgraphs(graph, topics, options), strict=True):
        np.testing.assert_array_equal(cut, expected)
        assert type(cut) is np.ndarray
