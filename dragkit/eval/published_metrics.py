"""Answer scores as the evaluators of published systems compute them, with their faults.

They serve comparison with published tables. As a measure use the `strict-*` scores of
`dragkit.eval.metrics`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Hashable, Sequence
from typing import NamedTuple

ROG_NAMES = ("rog-hit", "rog-hits@1", "rog-f1", "rog-precision", "rog-recall", "rog-accuracy")
SUBGRAPHRAG_NAMES = (
    "subgraphrag-hit",
    "subgraphrag-hits@1",
    "subgraphrag-f1",
    "subgraphrag-precision",
    "subgraphrag-recall",
)
REAREV_NAMES = (
    "rearev-hits@1",
    "rearev-f1",
    "rearev-precision",
    "rearev-recall",
    "rearev-em",
)

_DROP_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:an?|the)\b")

# For questions with one of these words, an answer that is part of a gold answer counts too.
_LENIENT_WORDS = (
    *("when", "what year", "which year", "where", "sport", "what countr"),
    *("language", "nba finals", "world series"),
)
_YEAR_WORDS = ("when", "what year")
_ANSWER_MARK = "ans:"
_REFUSALS = ("ans: not available", "ans: no information available")


def rog_normalize(text: str) -> str:
    """Normalises like the RoG evaluator: lower case, without ASCII punctuation and articles.

    That evaluator removes `<pad>` after the angle brackets are gone, so the word "pad" stays. A
    text of articles and punctuation becomes the empty string, which is part of every string.
    """
    words = _ARTICLE.sub(" ", text.lower().translate(_DROP_ASCII_PUNCTUATION))
    return " ".join(words.split())


def rog_scores(text: str, golds: Sequence[str]) -> dict[str, float]:
    """Scores one output like RoG and GNN-RAG: gold answers are substrings of the joined lines.

    Precision is (gold answers found) / (output lines) and can exceed 1. F1 is the harmonic mean of
    precision and recall. The lines are those of the stripped text: an empty text has one line.

    Args:
        text: the output, one answer per line.
        golds: the gold answers. Without any the evaluator divides by zero. Here all scores are 0.

    Returns:
        `rog-hit`, `rog-hits@1` (a gold answer is part of the first line), `rog-f1`,
        `rog-precision`, `rog-recall` and `rog-accuracy` (equal to the recall).

    Source: RoG `qa_prediction/evaluate_results.py`. Hits@1 is from GNN-RAG's copy of it.
    """
    if not golds:
        return dict.fromkeys(ROG_NAMES, 0.0)
    lines = text.strip().split("\n")
    joined, first = rog_normalize(" ".join(lines)), rog_normalize(lines[0])
    gold_keys = [rog_normalize(gold) for gold in golds]
    num_found = sum(gold in joined for gold in gold_keys)
    precision, recall = num_found / len(lines), num_found / len(golds)
    values = (
        float(num_found > 0),
        float(any(gold in first for gold in gold_keys)),
        _harmonic_mean(precision, recall),
        precision,
        recall,
        recall,
    )
    return dict(zip(ROG_NAMES, values, strict=True))


def subgraphrag_scores(text: str, golds: Sequence[str], question: str = "") -> dict[str, float]:
    """Scores one output like SubgraphRAG: `ans:` lines are matched one to one to gold answers.

    Answers are the distinct lines with "ans:", except refusals and lines that contain "none". A
    line matches a gold answer that it contains. If the question has a word such as "where" or
    "language", a gold answer that contains the line matches too. If it asks for a year, gold
    answers such as "1969-07-20" are cut to "1969". Pairs are chosen greedily, longest first.
    `subgraphrag-hit` is from an older evaluator, which reads the whole text if it has no "ans:".

    Args:
        text: the output, one answer per line, each after "ans:".
        golds: the gold answers. Without any the evaluator divides by zero. Here all scores are 0.
        question: the question, which selects the two lenient rules.

    Returns:
        `subgraphrag-hit`, `subgraphrag-hits@1`, `subgraphrag-f1`, `subgraphrag-precision` and
        `subgraphrag-recall`.

    Source: SubgraphRAG `reason/metrics/evaluate_results.py` (hit), `..._corrected.py` (others).
    """
    if not golds:
        return dict.fromkeys(SUBGRAPHRAG_NAMES, 0.0)
    lowered = question.lower()
    lenient = any(word in lowered for word in _LENIENT_WORDS)
    longest_first = sorted(dict.fromkeys(golds), key=len, reverse=True)
    if any(word in lowered for word in _YEAR_WORDS):
        longest_first = [_leading_year(gold) for gold in longest_first]
    gold_keys = [rog_normalize(gold) for gold in longest_first]
    lines = _answer_lines(text)
    first_hits = bool(lines) and any(_line_matches(lines[0], g, lenient) for g in gold_keys)
    if _ANSWER_MARK in text:
        hit = any(_line_matches(line, g, lenient) for line in lines for g in gold_keys)
    else:
        whole, parts = rog_normalize(text), [rog_normalize(part) for part in text.split("\n")]
        hit = any(
            gold in whole or (lenient and any(part in gold for part in parts)) for gold in gold_keys
        )
    num_matched = _greedy_matches(lines, gold_keys, lenient)
    precision = num_matched / len(lines) if lines else 0.0
    recall = num_matched / len(gold_keys)
    values = (
        float(hit),
        float(first_hits),
        _harmonic_mean(precision, recall),
        precision,
        recall,
    )
    return dict(zip(SUBGRAPHRAG_NAMES, values, strict=True))


def rearev_scores(
    entities: Sequence[Hashable],
    probabilities: Sequence[float],
    golds: Sequence[Hashable],
    *,
    topics: Sequence[Hashable] = (),
    mass: float = 0.95,
    max_nodes: int | None = None,
) -> dict[str, float]:
    """Scores a distribution over entities like NSM and ReaRev.

    Topics and entities below `(1 - mass) / max_nodes` are left out. The others are collected from
    the most probable down until their sum exceeds `mass`. Without gold entities, hits, recall and
    EM are 1, and precision and F1 are 1 only if nothing was collected. With gold entities and
    nothing collected, precision is 1. EM is 1 if any collected entity is a gold entity.

    Args:
        entities: the entities of the graph.
        probabilities: one for each entity.
        golds: gold entities. The recall divides by their number, including absent ones.
        topics: entities that the question is about.
        mass: probability at which collecting stops (`eps` of the released code).
        max_nodes: number of entities of the largest graph of the split. None takes this graph's.

    Returns:
        `rearev-hits@1`, `rearev-f1`, `rearev-precision`, `rearev-recall` and `rearev-em`.

    Raises:
        ValueError: the numbers of entities and probabilities differ.

    Source: GNN-RAG `gnn/evaluate.py`, after NSM.
    """
    if len(entities) != len(probabilities):
        raise ValueError(f"{len(entities)} entities but {len(probabilities)} probabilities")
    threshold = (1.0 - mass) / max(len(entities) if max_nodes is None else max_nodes, 1)
    topic_set, gold_set = set(topics), set(golds)
    candidates = [
        (entity, probability)
        for entity, probability in zip(entities, probabilities, strict=True)
        if entity not in topic_set and probability >= threshold
    ]
    candidates.sort(key=lambda pair: pair[1], reverse=True)
    collected, total = [], 0.0
    for entity, probability in candidates:
        collected.append(entity)
        total += probability
        if total > mass:
            break
    num_right = sum(entity in gold_set for entity in collected)
    if not golds:
        is_empty = float(not collected)
        values = (1.0, is_empty, is_empty, 1.0, 1.0)
    elif not collected:
        values = (0.0, 0.0, 1.0, 0.0, 0.0)
    else:
        precision, recall = num_right / len(collected), num_right / len(golds)
        f1 = _harmonic_mean(precision, recall)
        values = (float(collected[0] in gold_set), f1, precision, recall, float(num_right > 0))
    return dict(zip(REAREV_NAMES, values, strict=True))


def _harmonic_mean(precision: float, recall: float) -> float:
    """Returns F1, which is 0 if both are 0."""
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0


def _leading_year(gold: str) -> str:
    """Cuts "1969-07-20" to "1969". Other texts are returned as they are."""
    head, dash, _ = gold.partition("-")
    return head if dash and head.isdigit() else gold


class _Line(NamedTuple):
    """An answer line: its length, its key, and the key of what follows the last mark."""

    length: int
    whole: str
    answer: str


def _answer_lines(text: str) -> list[_Line]:
    """Returns the answer lines in order. Lines are distinct as written, not by key."""
    distinct: dict[str, _Line] = {}
    for line in text.split("\n"):
        lowered = line.lower()
        is_refusal = "none" in lowered or any(refusal in lowered for refusal in _REFUSALS)
        if _ANSWER_MARK in line and not is_refusal:
            answer = rog_normalize(line.rpartition(_ANSWER_MARK)[2])
            distinct[line] = _Line(len(line), rog_normalize(line), answer)
    return list(distinct.values())


def _line_matches(line: _Line, gold: str, lenient: bool) -> bool:
    """Whether a line contains the gold answer or, leniently, is contained in it."""
    return gold in line.whole or (lenient and line.answer in gold)


def _greedy_matches(lines: list[_Line], golds: list[str], lenient: bool) -> int:
    """Counts one-to-one matches. Each gold answer takes the longest unmatched line that fits."""
    unmatched = sorted(lines, key=lambda line: line.length, reverse=True)
    for gold in golds:
        for index, line in enumerate(unmatched):
            if _line_matches(line, gold, lenient):
                del unmatched[index]
                break
    return len(lines) - len(unmatched)
