"""Which facts a retriever should find: those on a shortest topic-answer path, or on given paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

LabelRule = Literal["auto", "shortest", "paths"]


class FactLabels(NamedTuple):
    """bool [E] positive facts, and what decided: "shortest", "paths", or "none" if none is."""

    positive: np.ndarray
    source: str


class _Neighbours:
    """Both directions of every fact, grouped by the node they leave."""

    def __init__(self, head: np.ndarray, tail: np.ndarray, num_nodes: int) -> None:
        start = np.concatenate([head, tail])
        order = np.argsort(start, kind="stable")
        self.end = np.concatenate([tail, head])[order]
        self.ptr = np.zeros(num_nodes + 1, dtype=np.int64)
        np.cumsum(np.bincount(start, minlength=num_nodes), out=self.ptr[1:])

    def of(self, nodes: np.ndarray) -> np.ndarray:
        """All neighbours of `nodes`, repeats included."""
        first = self.ptr[nodes]
        count = self.ptr[nodes + 1] - first
        shift = np.repeat(first - np.cumsum(count) + count, count)
        return self.end[shift + np.arange(len(shift))]


def _distances(near: _Neighbours, start: int, targets: np.ndarray) -> np.ndarray:
    """int64 [N] steps from `start`; -1 where unreachable or farther than every target."""
    distance = np.full(len(near.ptr) - 1, -1, dtype=np.int64)
    distance[start] = 0
    frontier, level = np.array([start]), 0
    while len(frontier) and (distance[targets] < 0).any():
        level += 1
        found = near.of(frontier)
        frontier = np.unique(found[distance[found] < 0])
        distance[frontier] = level
    return distance


def _on_shortest_paths(
    head: np.ndarray, tail: np.ndarray, near: _Neighbours, topic: int, answers: np.ndarray
) -> np.ndarray:
    """bool [E]: facts (u, v) with dist(topic, u) + 1 + dist(v, answer) = dist(topic, answer).

    Walked backward from all answers at once: a node is on the way when a neighbour one step farther
    out is, so one sweep serves every answer and no path is enumerated.
    """
    distance = _distances(near, topic, answers)
    reached = answers[distance[answers] > 0]
    on_way = np.zeros(len(distance), dtype=bool)
    on_way[reached] = True
    frontier = reached[:0]
    for level in range(int(distance[reached].max(initial=0)), 1, -1):
        frontier = np.union1d(frontier, reached[distance[reached] == level])
        inward = near.of(frontier)
        frontier = np.unique(inward[distance[inward] == level - 1])
        on_way[frontier] = True
    out_of_head = on_way[tail] & (distance[head] + 1 == distance[tail])
    out_of_tail = on_way[head] & (distance[tail] + 1 == distance[head])
    return out_of_head | out_of_tail


def _on_given_paths(
    head: np.ndarray, tail: np.ndarray, num_nodes: int, paths: Sequence[Sequence[int]]
) -> np.ndarray:
    """bool [E]: facts that join two neighbours of some path, whatever their direction."""
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
    """Marks the positive facts of a question; parallel relations are all kept.

    Under "shortest" a fact is positive when it lies on a shortest path, walked in either direction,
    between some topic and some answer. Under "paths" it is positive when it joins two
    consecutive entities of a given path. "auto" takes the first where it yields a fact, else the
    second.

    Args:
        head, tail: int [E] node rows of the facts; num_nodes: N.
        topics, answers: node rows; those that are not in the graph are left out by the caller.
        paths: node rows of the given paths, -1 for an entity outside the graph.
        rule: as above.

    Returns:
        The labels and their source.

    Raises:
        ValueError: unknown rule.
    """
    if rule not in ("auto", "shortest", "paths"):
        raise ValueError(f"label rule must be auto, shortest or paths, got {rule!r}")
    positive = np.zeros(len(head), dtype=bool)
    if rule != "paths" and len(head) and len(topics) and len(answers):
        near = _Neighbours(head, tail, num_nodes)
        targets = np.unique(np.asarray(answers, dtype=np.int64))
        for topic in topics:
            positive |= _on_shortest_paths(head, tail, near, topic, targets)
        if positive.any():
            return FactLabels(positive, "shortest")
    if rule != "shortest":
        positive = _on_given_paths(head, tail, num_nodes, paths)
        if positive.any():
            return FactLabels(positive, "paths")
    return FactLabels(positive, "none")
