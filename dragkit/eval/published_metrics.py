"""The answer scores that published systems report, faults included, so that tables can be matched.

One file because the three share a question: what exactly did the released evaluator compute?
Nothing here is meant as a good measure; the `strict-*` scores of `dragkit.eval.metrics` are.
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

# Questions that hold one of these words also count an answer that is part of a gold.
_LENIENT_WORDS = (
    *("when", "what year", "which year", "where", "sport", "what countr"),
    *("language", "nba finals", "world series"),
)
_YEAR_WORDS = ("when", "what year")
_ANSWER_MARK = "ans:"
_REFUSALS = ("ans: not available", "ans: no information available")


def rog_normalize(text: str) -> str:
    """Fold a string as the RoG evaluator does: lower case, ASCII punctuation deleted, no articles.

    Its removal of `<pad>` comes after the angle brackets are gone and so never acts; the word
    "pad" stays. A text of articles and punctuation alone becomes the empty string, which is
    part of every string.
    """
    kept = text.lower().translate(_DROP_ASCII_PUNCTUATION)
    return " ".join(_ARTICLE.sub(" ", kept).split())


def rog_scores(text: str, golds: Sequence[str]) -> dict[str, float]:
    """Score one output as RoG and GNN-RAG do: golds looked up as substrings of the joined lines.

    Precision is (golds found) / (output lines) and can pass 1; F1 is the harmonic mean of that
    and the recall. The lines are those of the stripped text, so an empty text is one empty line.

    Args:
        text: the output, one answer a line.
        golds: the gold answers. Without golds the evaluator divides by zero; here all are 0.

    Returns:
        `rog-hit`, `rog-hits@1` (some gold inside the first line), `rog-f1`, `rog-precision`,
        `rog-recall` and `rog-accuracy` (the same number as the recall).

    Source: RoG `qa_prediction/evaluate_results.py`; Hits@1 from GNN-RAG's copy of it.
    """
    if not golds:
        return dict.fromkeys(ROG_NAMES, 0.0)
    lines = text.strip().split("\n")
    joined, first = rog_normalize(" ".join(lines)), rog_normalize(lines[0])
    folded_golds = [rog_normalize(gold) for gold in golds]
    num_found = sum(gold in joined for gold in folded_golds)
    precision, recall = num_found / len(lines), num_found / len(golds)
    values = (
        float(num_found > 0),
        float(any(gold in first for gold in folded_golds)),
        _harmonic_mean(precision, recall),
        precision,
        recall,
        recall,
    )
    return dict(zip(ROG_NAMES, values, strict=True))


def subgraphrag_scores(text: str, golds: Sequence[str], question: str = "") -> dict[str, float]:
    """Score one output as SubgraphRAG does: `ans:` lines matched one to one with the golds.

    Answers are the distinct lines that hold "ans:", less refusals and less every line with the
    letters "none" in it. A line matches a gold that it contains. When the question has a word
    such as "where" or "language", a gold that contains the line matches too; when it asks for a
    year, golds such as "1969-07-20" are cut to "1969". Golds and lines are paired greedily,
    longest first. `subgraphrag-hit` comes from an older evaluator that reads the whole text
    when it has no "ans:".

    Args:
        text: the output, one answer a line, each after "ans:".
        golds: the gold answers. Without golds the evaluator divides by zero; here all are 0.
        question: the question, which switches the two lenient rules.

    Returns:
        `subgraphrag-hit`, `subgraphrag-hits@1`, `subgraphrag-f1`, `subgraphrag-precision` and
        `subgraphrag-recall`.

    Source: SubgraphRAG `reason/metrics/evaluate_results.py` (hit), `..._corrected.py` (others).
    """
    if not golds:
        return dict.fromkeys(SUBGRAPHRAG_NAMES, 0.0)
    lowered = question.lower()
    lenient = any(word in lowered for word in _LENIENT_WORDS)
    wanted = sorted(dict.fromkeys(golds), key=len, reverse=True)
    if any(word in lowered for word in _YEAR_WORDS):
        wanted = [_leading_year(gold) for gold in wanted]
    folded_golds = [rog_normalize(gold) for gold in wanted]
    lines = _answer_lines(text)
    first_hits = bool(lines) and any(_line_matches(lines[0], g, lenient) for g in folded_golds)
    if _ANSWER_MARK in text:
        hit = any(_line_matches(line, g, lenient) for line in lines for g in folded_golds)
    else:
        whole, parts = rog_normalize(text), [rog_normalize(part) for part in text.split("\n")]
        hit = any(
            gold in whole or (lenient and any(part in gold for part in parts))
            for gold in folded_golds
        )
    num_matched = _greedy_matches(lines, folded_golds, lenient)
    precision = num_matched / len(lines) if lines else 0.0
    recall = num_matched / len(folded_golds)
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
    """Score a distribution over entities as NSM and ReaRev do.

    Topics and entities below `(1 - mass) / max_nodes` are left out; the rest are collected from
    the most probable down until their sum passes `mass`. With no golds, hits, recall and EM are 1
    whatever was collected, and precision and F1 are 1 only when nothing was. With golds and
    nothing collected, precision is 1. EM means that any collected entity is a gold.

    Args:
        entities: the entities of the graph.
        probabilities: their probabilities, one each.
        golds: gold entities; the recall divides by their number, absent from the graph or not.
        topics: entities that the question is about.
        mass: where to stop collecting (`eps` of the released code).
        max_nodes: entities of the largest graph of the split; None takes this graph's number.

    Returns:
        `rearev-hits@1`, `rearev-f1`, `rearev-precision`, `rearev-recall` and `rearev-em`.

    Raises:
        ValueError: entities and probabilities differ in number.

    Source: GNN-RAG `gnn/evaluate.py`, after NSM.
    """
    if len(entities) != len(probabilities):
        raise ValueError(f"{len(entities)} entities but {len(probabilities)} probabilities")
    floor = (1.0 - mass) / max(len(entities) if max_nodes is None else max_nodes, 1)
    topic_set, gold_set = set(topics), set(golds)
    candidates = [
        (entity, probability)
        for entity, probability in zip(entities, probabilities, strict=True)
        if entity not in topic_set and probability >= floor
    ]
    candidates.sort(key=lambda pair: pair[1], reverse=True)
    collected, reached = [], 0.0
    for entity, probability in candidates:
        collected.append(entity)
        reached += probability
        if reached > mass:
            break
    num_right = sum(entity in gold_set for entity in collected)
    if not golds:
        nothing = float(not collected)
        values = (1.0, nothing, nothing, 1.0, 1.0)
    elif not collected:
        values = (0.0, 0.0, 1.0, 0.0, 0.0)
    else:
        precision, recall = num_right / len(collected), num_right / len(golds)
        f1 = _harmonic_mean(precision, recall)
        values = (float(collected[0] in gold_set), f1, precision, recall, float(num_right > 0))
    return dict(zip(REAREV_NAMES, values, strict=True))


def _harmonic_mean(precision: float, recall: float) -> float:
    """Return F1, 0 where both are 0."""
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0


def _leading_year(gold: str) -> str:
    """Cut "1969-07-20" to "1969"; other texts stay."""
    head, dash, _ = gold.partition("-")
    return head if dash and head.isdigit() else gold


class _Line(NamedTuple):
    """An answer line: its length as written, and folded as a whole and after the mark."""

    length: int
    whole: str
    answer: str


def _answer_lines(text: str) -> list[_Line]:
    """Return the distinct answer lines in order; duplicates are told before folding."""
    kept: dict[str, _Line] = {}
    for line in text.split("\n"):
        lowered = line.lower()
        refused = "none" in lowered or any(refusal in lowered for refusal in _REFUSALS)
        if _ANSWER_MARK in line and not refused:
            answer = rog_normalize(line.rpartition(_ANSWER_MARK)[2])
            kept[line] = _Line(len(line), rog_normalize(line), answer)
    return list(kept.values())


def _line_matches(line: _Line, gold: str, lenient: bool) -> bool:
    """Whether a line contains the gold or, leniently, its answer is contained in the gold."""
    return gold in line.whole or (lenient and line.answer in gold)


def _greedy_matches(lines: list[_Line], golds: list[str], lenient: bool) -> int:
    """Count one-to-one matches, each gold taking the longest free line that fits."""
    free = sorted(lines, key=lambda line: line.length, reverse=True)
    num_matched = 0
    for gold in golds:
        for place, line in enumerate(free):
            if _line_matches(line, gold, lenient):
                del free[place]
                num_matched += 1
                break
    return num_matched
