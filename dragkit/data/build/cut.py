"""The subgraph of a question: the facts around its topics, up to a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dragkit.data.build.graph import Graph
from dragkit.data.build.pagerank import NodeRanks, PageRank
from dragkit.data.build.walk import Walk

CutMethod = Literal["pagerank", "hops"]


@dataclass(frozen=True, slots=True)
class CutOptions:
    """How subgraphs are cut.

    Attributes:
        method: "pagerank" takes the facts of the highest rank. "hops" takes the facts within `hops`
            steps of a topic, the nearest first, and those of one distance by rank.
        max_facts: budget of a question, at least 1. Each topic that has a fact keeps its best one,
            so that more topics than this have more facts.
        hops: at least 1. A fact is within k hops if one of its ends is within k - 1.
        restart: probability that the walk of PageRank returns to the topics, above 0 and below 1.
        tolerance: error of a rank as a fraction of the lowest rank within the budget, above 0
            and below 1. By default 99 % of the facts on average are those of the exact ranks.
        excluded_relations: rows of relations whose facts are neither taken nor walked along.
    """

    method: CutMethod = "pagerank"
    max_facts: int = 2000
    hops: int = 2
    restart: float = 0.25
    tolerance: float = 0.1
    excluded_relations: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in ("pagerank", "hops"):
            raise ValueError(f"method is {self.method!r}, but has to be 'pagerank' or 'hops'")
        if not 0 < self.restart < 1:
            raise ValueError(f"restart is {self.restart}, but has to be above 0 and below 1")
        for name in ("max_facts", "hops"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but has to be at least 1")
        for name in ("restart", "tolerance"):
            if not 0 < getattr(self, name) < 1:
                value = getattr(self, name)
                raise ValueError(f"{name} is {value}, but has to be above 0 and below 1")


def cut_subgraphs(
    graph: Graph, topics: Sequence[Sequence[int]], options: CutOptions
) -> list[np.ndarray]:
    """Cuts the subgraph of each question.

    Args:
        graph: the facts, in memory or mapped.
        topics: rows of the entities that each question is about.
        options: the same for all questions.

    Returns:
        int32 ascending rows of facts for each question, none where no topic has a fact. They depend
        on the question alone, whatever the other questions are.

    Raises:
        ValueError: an option is out of range, or the graph has no entity or relation of a row.
    """
    cutter = Cutter(graph, options)
    return [cutter(rows) for rows in topics]


class Cutter:
    """Cuts one question after another. It prepares once what all of them need.

    The rank of a fact is the flow across it from both ends: PageRank over degree, summed over its
    ends. Ranks are compared in float32, so that the rounding of sums does not order facts that tie.
    Of these the first row wins.

    Raises:
        ValueError: as `cut_subgraphs` does.
    """

    def __init__(self, graph: Graph, options: CutOptions) -> None:
        self.options = options
        self.walk = Walk(graph, options.excluded_relations)
        self.pagerank = PageRank(self.walk, options.restart)
        # Both are 0 between two questions, and written at the nodes of a question only.
        self._flow = np.zeros(graph.num_entities)
        self._distance = np.zeros(graph.num_entities, dtype=np.int32)

    def __call__(self, topics: Sequence[int]) -> np.ndarray:
        """Returns int32 ascending rows of the facts of one question."""
        options = self.options
        ranks = self.pagerank.for_budget(topics, options.max_facts, options.tolerance)
        rows, flow = np.unique(np.asarray(topics, dtype=np.int64)), ranks.flow()
        if options.method == "hops":
            facts, hop = self._facts_within_hops(rows)
        else:
            facts = self._facts_of_high_rank(rows, ranks, flow)
            hop = np.zeros(len(facts), dtype=np.int64)
        self._flow[ranks.nodes] = flow
        head, tail = self.walk.head[facts], self.walk.tail[facts]
        rank = (self._flow[head] + self._flow[tail]).astype(np.float32)
        self._flow[ranks.nodes] = 0
        order = np.lexsort((facts, -rank, hop))
        best = self._best_of_topics(rows, head[order], tail[order])
        taken = _first(best, len(facts), options.max_facts)
        return np.sort(facts[order[taken]]).astype(np.int32)

    def _facts_of_high_rank(
        self, topics: np.ndarray, ranks: NodeRanks, flow: np.ndarray
    ) -> np.ndarray:
        """Returns facts among which are those of the topics and the `max_facts` of highest rank.

        The facts of the nodes of highest flow fill the budget, and the lowest flow of these nodes
        is at most their rank. Any other fact of such a rank has an end with half of this flow.
        """
        # A little less than a half, for ranks that tie in float32.
        least = 0.49 * ranks.least_flow(self.options.max_facts)
        is_taken = ranks.is_pushed & (flow >= least) | np.isin(ranks.nodes, topics)
        return self.walk.facts_at(ranks.nodes[is_taken])

    def _facts_within_hops(self, topics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the facts within the hops, or fewer hops that fill the budget, and their hops."""
        level, found, seen = topics, [], [topics]
        self._distance[topics] = 1
        for hop in range(1, self.options.hops + 1):
            facts = self.walk.facts_at(level)
            ends = self._distance[np.stack([self.walk.head[facts], self.walk.tail[facts]])]
            # The facts with an end that is nearer than this level were found before.
            found.append(facts[((ends == 0) | (ends == hop)).all(0)])
            if not len(facts) or sum(map(len, found)) >= self.options.max_facts:
                break
            reached = self.walk.steps(level)[0]
            level = np.unique(reached[self._distance[reached] == 0]).astype(np.int64)
            self._distance[level] = hop + 1
            seen.append(level)
        self._distance[np.concatenate(seen)] = 0
        return np.concatenate(found), np.repeat(np.arange(len(found)), [len(f) for f in found])

    def _best_of_topics(self, topics: np.ndarray, head: np.ndarray, tail: np.ndarray) -> np.ndarray:
        """Returns the distinct positions of the first fact at each topic that has one."""
        first = [np.flatnonzero((head == topic) | (tail == topic))[:1] for topic in topics]
        return np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *first]))


def _first(best: np.ndarray, count: int, budget: int) -> np.ndarray:
    """Returns `best` and the first other positions below `count`, up to the budget in sum."""
    is_other = np.ones(count, dtype=bool)
    is_other[best] = False
    return np.concatenate([best, np.flatnonzero(is_other)[: max(budget - len(best), 0)]])
