"""Canonical arrays of a question, and conversion from and to PyG."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from dragkit.data.question_file import Question, read_questions
from dragkit.data.relations import RelationVocab
from dragkit.data.subgraph import build_subgraph, from_pyg, to_pyg

FACTS = [["b", "s", "a"], ["a", "r", "c"], ["a", "r", "b"], ["c", "r", "c"]]


def test_arrays_by_hand(question: Callable[..., Question]) -> None:
    vocab = RelationVocab(["x"])
    example = question(FACTS, topics=("a", "gone"), answers=("c", "b"))
    graph = build_subgraph(example, vocab)
    assert graph.names == ("a", "b", "c")
    assert vocab.names == ("x", "r", "s")
    assert graph.head.tolist() == [0, 0, 1, 2]
    assert graph.relation.tolist() == [1, 1, 2, 1]
    assert graph.tail.tolist() == [1, 2, 0, 2]
    assert graph.topics.tolist() == [0]
    assert graph.answers.tolist() == [2, 1]
    assert graph.label.tolist() == [True, True, True, False]
    arrays = (graph.head, graph.tail, graph.relation, graph.topics, graph.answers)
    assert {array.dtype for array in arrays} == {np.dtype(np.int32)}


def test_shuffled_and_repeated_facts_give_the_same_arrays(
    question: Callable[..., Question],
) -> None:
    draw = random.Random(0)
    facts = [
        [f"e{draw.randrange(9)}", f"r{draw.randrange(3)}", f"e{draw.randrange(9)}"]
        for _ in range(30)
    ]
    first, vocab = None, None
    for _ in range(5):
        draw.shuffle(facts)
        vocab_of_shuffled = RelationVocab()
        graph = build_subgraph(
            question(facts + facts[:7], topics=("e1",), answers=("e2",)), vocab_of_shuffled
        )
        if first is None:
            first, vocab = graph, vocab_of_shuffled
        assert vocab_of_shuffled.names == vocab.names
        assert graph.names == first.names
        for name in ("head", "tail", "relation", "topics", "answers", "label"):
            assert np.array_equal(getattr(graph, name), getattr(first, name)), name


def test_no_facts(question: Callable[..., Question]) -> None:
    graph = build_subgraph(question([], topics=("a",), answers=("b",)), RelationVocab())
    assert (graph.num_nodes, graph.num_facts) == (0, 0)
    assert graph.topics.size == graph.answers.size == graph.label.size == 0


def test_pyg_round_trip(tiny_file: object) -> None:
    pytest.importorskip("torch_geometric")
    for example in read_questions(tiny_file).questions:  # type: ignore[arg-type]
        vocab = RelationVocab()
        graph = build_subgraph(example, vocab, label_rule="shortest")
        data = to_pyg(graph)
        assert data.num_nodes == graph.num_nodes
        assert data.edge_label.bool().tolist() == graph.label.tolist()
        data.relation_names = vocab.names
        back = from_pyg(data, id=example.id, text=example.text, answers=example.answers)
        assert sorted(back.triples) == sorted(example.triples)
        again = build_subgraph(back, RelationVocab(vocab.names), label_rule="shortest")
        assert again.names == graph.names
        assert np.array_equal(again.relation, graph.relation)
        assert np.array_equal(again.label, graph.label)
        assert again.topics.tolist() == sorted(graph.topics.tolist())


def test_from_pyg_needs_names() -> None:
    pytest.importorskip("torch_geometric")
    import torch
    from torch_geometric.data import Data

    data = Data(edge_index=torch.tensor([[0], [1]]), num_nodes=2, names=["a", "b"])
    with pytest.raises(ValueError, match="1 facts"):
        from_pyg(data, id="q", text="?")
    data.relations = ["r"]
    assert from_pyg(data, id="q", text="?").triples == (("a", "r", "b"),)
