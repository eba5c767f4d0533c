"""Labels against path enumeration by networkx, and cases by hand."""

from __future__ import annotations

import random
from collections.abc import Callable

import networkx as nx
import numpy as np
import pytest

from dragkit.data.labels import fact_labels
from dragkit.data.question_file import Question
from dragkit.data.relations import RelationVocab
from dragkit.data.subgraph import build_subgraph


def label_map(question: Question, rule: str) -> tuple[dict, str]:
    vocab = RelationVocab()
    graph = build_subgraph(question, vocab, label_rule=rule)
    triples = [
        (graph.names[h], vocab.names[r], graph.names[t])
        for h, r, t in zip(graph.head, graph.relation, graph.tail, strict=True)
    ]
    return dict(zip(triples, graph.label.tolist(), strict=True)), graph.label_source


def facts_on_shortest_paths(question: Question) -> set:
    """Enumerates the shortest paths between topics and answers of the undirected multigraph."""
    graph = nx.Graph()
    graph.add_edges_from((h, t) for h, _, t in question.triples)
    steps = set()
    for topic in question.topics:
        for answer in question.answers:
            if topic in graph and answer in graph and nx.has_path(graph, topic, answer):
                for path in nx.all_shortest_paths(graph, topic, answer):
                    steps |= {frozenset(pair) for pair in zip(path, path[1:], strict=False)}
    return {fact for fact in question.triples if frozenset((fact[0], fact[2])) in steps}


@pytest.mark.parametrize("seed", range(60))
def test_shortest_rule_equals_enumeration(seed: int, question: Callable[..., Question]) -> None:
    draw = random.Random(seed)
    names = [f"e{i}" for i in range(draw.randint(2, 14))]
    triples = {
        (draw.choice(names), f"r{draw.randrange(3)}", draw.choice(names))
        for _ in range(draw.randint(1, 40))
    }
    example = question(
        sorted(triples),
        topics=tuple(draw.sample(names, draw.randint(1, 2))),
        answers=tuple(draw.sample(names, draw.randint(1, min(5, len(names))))),
    )
    expected = facts_on_shortest_paths(example)
    labels, source = label_map(example, "shortest")
    assert {fact for fact, positive in labels.items() if positive} == expected
    assert source == ("shortest" if expected else "none")


def test_parallel_relations_of_both_directions_are_all_positive(
    question: Callable[..., Question],
) -> None:
    facts = [["a", "r", "b"], ["a", "s", "b"], ["b", "t", "a"], ["a", "r", "a"], ["b", "r", "c"]]
    for rule, fields in (
        ("shortest", {"topics": ("a",), "answers": ("b",)}),
        ("paths", {"paths": (("a", "b"),)}),
        ("paths", {"paths": (("b", "a"),)}),
    ):
        labels, source = label_map(question(facts, **fields), rule)
        positive = {fact for fact, value in labels.items() if value}
        assert positive == {("a", "r", "b"), ("a", "s", "b"), ("b", "t", "a")}
        assert source == rule


@pytest.mark.parametrize(
    ("fields", "rule", "source", "count"),
    [
        ({"topics": ("a",), "answers": ("c",), "paths": (("a", "z"),)}, "auto", "shortest", 2),
        ({"topics": ("a",), "answers": (), "paths": (("a", "b"),)}, "auto", "paths", 1),
        ({"topics": ("a",), "answers": ("x",), "paths": (("a", "b"),)}, "auto", "paths", 1),
        # Topic and answer are not connected.
        ({"topics": ("a",), "answers": ("z",), "paths": (("y", "z"),)}, "auto", "paths", 1),
        # The answer is the topic, so only a given path tells the relevant facts.
        ({"topics": ("a",), "answers": ("a",), "paths": (("a", "b", "a"),)}, "auto", "paths", 1),
        ({"topics": ("a",), "answers": ("z",), "paths": (("y", "z"),)}, "shortest", "none", 0),
        ({"topics": ("a",), "answers": ("c",), "paths": (("y", "z"),)}, "paths", "paths", 1),
        ({"paths": (("a", "gone", "b"), ("a", "c"))}, "paths", "none", 0),
        ({}, "auto", "none", 0),
    ],
)
def test_which_rule_decides(
    fields: dict, rule: str, source: str, count: int, question: Callable[..., Question]
) -> None:
    facts = [["a", "r", "b"], ["b", "r", "c"], ["y", "r", "z"]]
    labels, label_source = label_map(question(facts, **fields), rule)
    assert (label_source, sum(labels.values())) == (source, count)


def test_unknown_rule() -> None:
    with pytest.raises(ValueError, match="label rule"):
        fact_labels(np.array([0]), np.array([1]), num_nodes=2, topics=[0], answers=[1], rule="gold")


def test_a_long_chain() -> None:
    nodes = np.arange(3001, dtype=np.int32)
    order = np.random.default_rng(0).permutation(3000)
    head, tail = nodes[:-1][order], nodes[1:][order]
    labels = fact_labels(head, tail, num_nodes=3001, topics=[0], answers=[2000])
    assert labels.positive.tolist() == (order < 2000).tolist()
