"""Facts that others judged relevant: evidence and relation chains. No training reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dragkit.data.question_file import Question

# Bits of `FactRelevance`.
EVIDENCE = 1
RELATION_PATH = 2

_INVERSE = "^-1"


class FactRelevance(NamedTuple):
    """The facts of a question that others judged relevant.

    Attributes:
        bits: uint8 [E] sum of `EVIDENCE` and `RELATION_PATH`, as far as they apply to the fact.
        judged: the same bits, of the judgements that the question has. A question may have a
            judgement that marks no fact of its graph.
    """

    bits: np.ndarray
    judged: int


def fact_relevance(
    question: Question,
    facts: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    node_of: dict[str, int],
    relation_of: dict[str, int],
    topics: Sequence[int],
    answers: Sequence[int],
) -> FactRelevance:
    """Marks the facts that are evidence, and those on a walk along a relation chain.

    Args:
        question: its evidence and relation paths are read. An empty list is no judgement.
        facts: head, relation and tail rows of the facts, int [E] each.
        node_of, relation_of: rows of the names in the graph.
        topics, answers: node rows. The caller leaves out names that are not in the graph.
    """
    bits, judged = np.zeros(len(facts[0]), dtype=np.uint8), 0
    if question.evidence:
        judged |= EVIDENCE
        wanted = [
            (node_of[h], relation_of[r], node_of[t])
            for h, r, t in question.evidence
            if h in node_of and r in relation_of and t in node_of
        ]
        for head, relation, tail in wanted:
            bits[(facts[0] == head) & (facts[1] == relation) & (facts[2] == tail)] |= EVIDENCE
    if question.relation_paths:
        judged |= RELATION_PATH
        start, end = np.zeros((2, len(node_of)), dtype=bool)
        start[list(topics)] = True
        end[list(answers) or slice(None)] = True
        for path in question.relation_paths:
            chain = [
                (relation_of.get(name.removesuffix(_INVERSE), -1), name.endswith(_INVERSE))
                for name in path
            ]
            bits[_on_walks(*facts, chain, start, end)] |= RELATION_PATH
    return FactRelevance(bits, judged)


def _on_walks(
    head: np.ndarray,
    relation: np.ndarray,
    tail: np.ndarray,
    chain: Sequence[tuple[int, bool]],
    start: np.ndarray,
    end: np.ndarray,
) -> np.ndarray:
    """Marks the facts on walks from a start to an end, one fact of each relation, bool [E].

    No walk is enumerated: facts that the starts reach are kept if they reach an end.

    Args:
        head, relation, tail: int [E] rows of the facts.
        chain: relation of each step, and whether it is walked from tail to head.
        start, end: bool [N].
    """
    steps = []
    reached = start
    for step_relation, is_inverse in chain:
        source, target = (tail, head) if is_inverse else (head, tail)
        taken = (relation == step_relation) & reached[source]
        steps.append((taken, source, target))
        reached = np.zeros_like(start)
        reached[target[taken]] = True
    on_walk = np.zeros(len(head), dtype=bool)
    wanted = end
    for taken, source, target in reversed(steps):
        kept = taken & wanted[target]
        on_walk |= kept
        wanted = np.zeros_like(end)
        wanted[source[kept]] = True
    return on_walk
