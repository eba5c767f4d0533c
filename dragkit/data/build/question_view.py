"""One question as it is shown: its facts in order of their distance from the topics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dragkit.data.evidence import EVIDENCE
from dragkit.data.labels import hops_from
from dragkit.data.question_file import Question
from dragkit.data.relations import RelationVocab
from dragkit.data.subgraph import Subgraph, build_subgraph


@dataclass(frozen=True)
class ShownFact:
    """A fact with its node rows.

    Attributes:
        head, relation, tail: names.
        rows: node rows of head and tail.
        hops: of the way from the nearest topic over this fact. None if no way leads there.
        is_positive: the retriever learns to find it.
        is_evidence: others judged it relevant.
    """

    head: str
    relation: str
    tail: str
    rows: tuple[int, int]
    hops: int | None
    is_positive: bool
    is_evidence: bool


class QuestionView:
    """A question, its graph and its facts.

    Attributes:
        question, graph: as they are read and labelled.
        facts: the nearest first, then in the order of their names.
        hops: hops of each node from the nearest topic, -1 if no way leads there.
        names: names of the nodes.
    """

    def __init__(self, question: Question) -> None:
        vocab = RelationVocab()
        self.question = question
        self.graph: Subgraph = build_subgraph(question, vocab)
        graph, everywhere = self.graph, np.arange(self.graph.num_nodes)
        self.names = frozenset(graph.names)
        self.hops = hops_from(graph.head, graph.tail, graph.num_nodes, graph.topics, everywhere)
        near = self.hops[np.stack([graph.head, graph.tail])].min(0)
        # Both ends of a fact are reached, or none is.
        order = np.lexsort((np.arange(graph.num_facts), np.where(near < 0, len(near), near)))
        self.facts = [
            ShownFact(
                head=graph.names[graph.head[row]],
                relation=vocab.names[graph.relation[row]],
                tail=graph.names[graph.tail[row]],
                rows=(int(graph.head[row]), int(graph.tail[row])),
                hops=int(near[row]) + 1 if near[row] >= 0 else None,
                is_positive=bool(graph.label[row]),
                is_evidence=bool(graph.relevance.bits[row] & EVIDENCE),
            )
            for row in order.tolist()
        ]

    @property
    def positive(self) -> list[ShownFact]:
        """The positive facts."""
        return [fact for fact in self.facts if fact.is_positive]

    @property
    def others(self) -> list[ShownFact]:
        """All other facts."""
        return [fact for fact in self.facts if not fact.is_positive]
