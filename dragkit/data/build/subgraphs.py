"""From questions without subgraphs to the lines of a file of questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import msgspec

from dragkit.data.build.cut import CutOptions, Cutter
from dragkit.data.build.graph import Graph, find_name
from dragkit.data.build.parts import Line, Part
from dragkit.data.build.sources import SourceQuestion
from dragkit.data.question_file import Question

# A question may name thousands of entities. The first few show what is wrong.
_SHOWN = 3


class SubgraphBuilder:
    """Gives questions their subgraphs.

    A question that brings facts keeps them, cut if `options` is given. Any other takes its
    subgraph from `graph`.

    Args:
        graph: the knowledge graph, None where all questions bring their facts.
        options: how to cut. None keeps the facts of a question whole, and needs no graph.
        exclude: names of relations that no subgraph holds.
    """

    def __init__(
        self,
        graph: Graph | None,
        options: CutOptions | None,
        exclude: frozenset[str] = frozenset(),
    ) -> None:
        self.graph, self.options, self.exclude = graph, options, exclude
        self._cutter = None if graph is None or options is None else Cutter(graph, options)

    def lines(self, sources: Sequence[tuple[SourceQuestion, str]], part: Part) -> list[Line]:
        """Returns the lines of some questions, each given with its split, in their order.

        `part` counts them.
        """
        return [
            Line(split, self._encode(self._with_subgraph(source, part), source, part))
            for source, split in sources
        ]

    def _with_subgraph(self, source: SourceQuestion, part: Part) -> Question:
        question = source.question
        if question.triples or self.graph is None or self._cutter is None:
            return self._own_facts(question)
        facts = self._cutter(self._topic_rows(self.graph, source, part))
        return replace(question, triples=tuple(self.graph.triples(facts)))

    def _own_facts(self, question: Question) -> Question:
        """The question with its own facts, cut where they exceed the budget."""
        triples = tuple(t for t in question.triples if t[1] not in self.exclude)
        if self.options is not None and len(triples) > self.options.max_facts:
            graph = Graph.from_triples(triples)
            rows = [find_name(graph.entities, name) for name in question.topics]
            # Excluded relations are rows of the knowledge graph. Here they are gone already.
            options = replace(self.options, excluded_relations=())
            facts = Cutter(graph, options)([row for row in rows if row is not None])
            triples = tuple(graph.triples(facts))
        return replace(question, triples=triples)

    def _topic_rows(self, graph: Graph, source: SourceQuestion, part: Part) -> list[int]:
        topics = source.question.topics
        rows = [find_name(graph.entities, name) for name in topics]
        if missing := [name for name, row in zip(topics, rows, strict=True) if row is None]:
            names = ", ".join(map(repr, missing[:_SHOWN]))
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            part.counts["missing_topic"] += 1
            part.missing_topics.append(f"{source.place}: topics not in the graph: {names}{more}")
        return [row for row in rows if row is not None]

    def _encode(self, question: Question, source: SourceQuestion, part: Part) -> bytes:
        entities = {name for head, _, tail in question.triples for name in (head, tail)}
        found = sum(name in entities for name in question.answers)
        part.counts += self._counts(question, entities, found)
        part.counts["linked"] += bool(question.topics and source.extra.get("topics_linked"))
        row: dict[str, object] = {
            "id": question.id,
            "question": question.text,
            "answer": question.answers,
            "topic_entities": question.topics,
            "answer_in_subgraph": found > 0,
            "answers_in_subgraph": found,
        }
        optional = {
            "group": source.group,
            "paths": question.paths,
            "relation_paths": question.relation_paths,
            "evidence": question.evidence,
        }
        row |= {key: value for key, value in optional.items() if value}
        row |= {key: value for key, value in source.extra.items() if key not in row}
        return msgspec.json.encode(row | {"triples": question.triples})

    def _counts(self, question: Question, entities: set[str], found: int) -> Counter[str]:
        """What a line adds to the counts of its part."""
        answers, topics = question.answers, question.topics
        is_known = self.graph is not None and any(
            find_name(self.graph.entities, name) is not None for name in answers
        )
        return Counter(
            questions=1,
            facts=len(question.triples),
            without_facts=not question.triples,
            without_topic=not topics,
            topic_in_subgraph=any(name in entities for name in topics),
            without_answer=not answers,
            answer_in_subgraph=found > 0,
            answer_in_graph_alone=is_known and not found,
        )
