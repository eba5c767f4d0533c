"""Gold prompts: positive facts by falling logit, whatever was retrieved."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dragkit.data.packed import PackedGraph
from dragkit.retriever.gold_facts import gold_facts
from dragkit_kernels import FactSelection, top_facts
from tests.retriever import retriever_cases as cases

SIZES = (9, 0, 6, 1, 4, 7)
K = 3


def make_graph(labels: list[list[int]]) -> PackedGraph:
    rng = np.random.default_rng(0)
    graphs = [cases.make_graph(rng, 5 if size else 0, size, 3) for size in map(len, labels)]
    graph = cases.pack(graphs, dtype=torch.float32).graph
    return replace(graph, label=torch.tensor(sum(labels, []), dtype=torch.float32))


def chosen(selection: FactSelection, graph: PackedGraph) -> list[list[int]]:
    """Selected facts of each question, as positions within the question."""
    starts = graph.fact_ptr.tolist()
    rows = [
        [fact - start for fact in row if fact >= 0]
        for row, start in zip(selection.index.tolist(), starts, strict=False)
    ]
    assert [len(row) for row in rows] == selection.count.tolist()
    assert torch.equal(selection.gate, (selection.index >= 0).float())
    return rows


@pytest.mark.parametrize("seed", range(20))
def test_positive_facts_by_falling_logit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = [rng.integers(0, 2, size).tolist() for size in SIZES]
    graph = make_graph(labels)
    # Repeated logits, and probabilities far below every threshold.
    logits = torch.tensor(rng.integers(-3, 3, sum(SIZES)) * 30.0, dtype=torch.float32)
    retrieved = top_facts(logits, graph.fact_ptr, K, 0.01)
    expected = chosen(retrieved, graph)
    for row, (facts, start) in enumerate(zip(labels, graph.fact_ptr.tolist(), strict=False)):
        gold = [fact for fact, label in enumerate(facts) if label]
        if gold:
            expected[row] = sorted(gold, key=lambda fact: (-logits[start + fact], fact))[:K]  # noqa: B023
    assert chosen(gold_facts(logits, graph, retrieved), graph) == expected


def test_without_any_positive_fact_the_retrieved_ones_stay() -> None:
    graph = make_graph([[0] * size for size in SIZES])
    logits = torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(0))
    retrieved = top_facts(logits, graph.fact_ptr, K, 0.5)
    kept = gold_facts(logits, graph, retrieved)
    for name in ("index", "gate", "count"):
        assert torch.equal(getattr(kept, name), getattr(retrieved, name)), name
