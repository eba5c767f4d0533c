"""Labels of facts: positive on a shortest path from a topic to an answer, or on a given path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

LabelRule = Literal["auto", "shortest", "paths"]


class FactLabels(NamedTuple):
    """The positive facts of a question.

    Attributes:
        positive: bool [E].
        source: the rule that found them, "shortest" or "paths", or "none" if no fact is positive.
    """

    positive: np.ndarray
    source: str


def hops_from(
    head: np.ndarray,
    tail: np.ndarray,
    num_nodes: int,
    start: int | np.ndarray,
    targets: np.ndarray,
) -> np.ndarray:
    """Returns the hops of the shortest way from a start to each node, facts walked either way.

    Args:
        head, tail: int [E] node rows of the facts.
        num_nodes: N.
        start: one node row, or several.
        targets: node rows to be reached.

    Returns:
        int64 [N], -1 for a node that is unreachable or farther than every target.
    """
    distance = np.full(num_nodes, -1, dtype=np.int64)
    distance[start] = level = 0
    while (distance[targets] < 0).any():
        from_head, from_tail = distance[head], distance[tail]
        frontier = np.concatenate(
            [
                tail[(from_head == level) & (from_tail < 0)],
                head[(from_tail == level) & (from_head < 0)],
            ]
        )
        if not len(frontier):
            break
        level += 1
        distance[frontier] = level
    return distance


def _on_shortest_paths(
    head: np.ndarray, tail: np.ndarray, num_nodes: int, topic: int, answers: np.ndarray
) -> np.ndarray:
    """Marks facts (u, v) with dist(topic, u) + 1 + dist(v, answer) = dist(topic, answer), bool [E].

    One sweep from the farthest answers to the topic covers all answers. A fact is positive if its
    outer end is an answer or the inner end of a positive fact. No path is enumerated.
    """
    distance = hops_from(head, tail, num_nodes, topic, answers)
    on_path = np.zeros(num_nodes, dtype=bool)
    on_path[answers[distance[answers] > 0]] = True
    positive = np.zeros(len(head), dtype=bool)
    # Outer levels first: a node is on a path once the facts one level further out are marked.
    for level in range(int(distance[answers].max(initial=0)), 0, -1):
        for inner, outer in ((head, tail), (tail, head)):
            step = (distance[outer] == level) & (distance[inner] == level - 1) & on_path[outer]
            on_path[inner[step]] = True
            positive |= step
    return positive


def _on_given_paths(
    head: np.ndarray, tail: np.ndarray, num_nodes: int, paths: Sequence[Sequence[int]]
) -> np.ndarray:
    """Marks facts that join two consecutive nodes of some path in either direction, bool [E]."""
    steps = [
        (min(a, b), max(a, b))
        for path in paths
        for a, b in zip(path, path[1:], strict=False)
        if a >= 0 and b >= 0
    ]
    if not steps:
        return np.zeros(len(head), dtype=bool)
    low, high = np.array(sorted(set(steps)), dtype=np.int64).T
    key = np.minimum(head, tail).astype(np.int64) * num_nodes + np.maximum(head, tail)
    return np.isin(key, low * num_nodes + high)


def fact_labels(
    head: np.ndarray,
    tail: np.ndarray,
    *,
    num_nodes: int,
    topics: Sequence[int],
    answers: Sequence[int],
    paths: Sequence[Sequence[int]] = (),
    rule: LabelRule = "auto",
) -> FactLabels:
    """Marks the positive facts of a question. All parallel relations are marked.

    Under "shortest" a fact is positive if it lies on a shortest path between some topic and some
    answer. Facts are walked in both directions. Under "paths" it is positive if it joins two
    consecutive entities of a given path. "auto" applies "shortest", and "paths" if that marks none.

    Args:
        head, tail: int [E] node rows of the facts.
        num_nodes: N.
        topics, answers: node rows. The caller leaves out names that are not in the graph.
        paths: node rows of the given paths, -1 for an entity outside the graph.
        rule: "auto", "shortest" or "paths".

    Raises:
        ValueError: the rule is unknown.
    """
    if rule not in ("auto", "shortest", "paths"):
        raise ValueError(f"label rule must be auto, shortest or paths, got {rule!r}")
    positive = np.zeros(len(head), dtype=bool)
    if rule != "paths" and len(head) and len(topics) and len(answers):
        targets = np.unique(np.asarray(answers, dtype=np.int64))
        for topic in topics:
            positive |= _on_shortest_paths(head, tail, num_nodes, topic, targets)
        if positive.any():
            return FactLabels(positive, "shortest")
    if rule != "shortest":
        positive = _on_given_paths(head, tail, num_nodes, paths)
        if positive.any():
            return FactLabels(positive, "paths")
    return FactLabels(positive, "none")
