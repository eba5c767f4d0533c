"""The questions of a source with their topics and splits, surveyed before anything is cut."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from dragkit.data.build.graph import Graph, find_name
from dragkit.data.build.linking import EntityLinker
from dragkit.data.build.sources import Source, SourceQuestion
from dragkit.data.build.splits import group_of, split_of
from dragkit.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SplitRule:
    """Which file a question goes to, where its source names none.

    Attributes:
        fractions: share of the groups by name of the file.
        seed: seed of the hash.
    """

    fractions: Mapping[str, float]
    seed: int = 0

    def split(self, source: SourceQuestion) -> str:
        """Returns the file's name. All questions of one group go to one file."""
        return source.split or split_of(group_of(source), self.fractions, self.seed)


class Questions:
    """The questions of a source with topics and splits, in the source's order.

    Args:
        source: can be read more than once.
        rule: the split of a question whose source names none.
        linker: finds the topics of a question that names none. None leaves it without.
    """

    def __init__(self, source: Source, rule: SplitRule, linker: EntityLinker | None) -> None:
        self.source, self.rule, self.linker = source, rule, linker

    def __iter__(self) -> Iterator[tuple[SourceQuestion, str]]:
        for item in self.source:
            yield self._with_topics(item), self.rule.split(item)

    def _with_topics(self, item: SourceQuestion) -> SourceQuestion:
        if item.question.topics or self.linker is None:
            return item
        mentions = self.linker.link(item.question.text)
        topics = tuple(dict.fromkeys(mention.name for mention in mentions))
        question = replace(item.question, topics=topics)
        return replace(item, question=question, extra=item.extra | {"topics_linked": True})

    def survey(self, graph: Graph | None) -> int:
        """Reads all questions once and returns their number.

        Raises:
            DataError: lines cannot be used (lists all), or no question can get a subgraph.
        """
        counts: Counter[str] = Counter()
        for item, _ in self:
            question = item.question
            counts["questions"] += 1
            counts["with_facts"] += bool(question.triples)
            counts["with_topic"] += bool(question.topics)
            counts["with_known_topic"] += graph is not None and any(
                find_name(graph.entities, name) is not None for name in question.topics
            )
        self.source.check()
        if not counts["questions"]:
            raise DataError(f"{self.source.path}: holds no question.")
        if not counts["with_facts"] and graph is None:
            raise DataError(
                f"{self.source.path}: no question brings facts. Name the files of a knowledge "
                "graph with --graph."
            )
        if not counts["with_facts"] and not counts["with_known_topic"]:
            raise DataError(self._nothing_to_cut(counts))
        return counts["questions"]

    def _nothing_to_cut(self, counts: Counter[str]) -> str:
        """Why no question can get a subgraph."""
        if not counts["with_topic"]:
            return (
                f"{self.source.path}: none of {counts['questions']} questions names a topic, and "
                "no name of the graph occurs in their texts. Add a column of topics, or other "
                "names of the entities with --aliases."
            )
        item = next(item for item, _ in self if item.question.topics)
        return (
            f"{self.source.path}: none of {counts['with_topic']} questions with a topic has one "
            f"that is an entity of the graph, for example {item.place}: "
            f"{item.question.topics[0]!r}. Use the names that the graph's files use."
        )
