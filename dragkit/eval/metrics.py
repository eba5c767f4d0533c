"""Per-question metrics: the answer parser, the strict scores and the retrieval scores.

One file because these are the definitions that the project recommends. Scores kept only to
match published tables are in `published_metrics.py`, means over questions in `report.py`.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Hashable, Iterable, Sequence
from collections.abc import Set as AbstractSet

from dragkit.data.tokens import ANSWER_DELIMITER
from dragkit.eval.published_metrics import rog_scores, subgraphrag_scores

# Raised whenever a change of parser, folding or formula can change a number.
METRIC_VERSION = 1

STRICT_NAMES = (
    "strict-hits@1",
    "strict-hit",
    "strict-f1",
    "strict-precision",
    "strict-recall",
    "strict-exact",
)

_ARTICLES = frozenset({"a", "an", "the"})
_ASCII_PUNCTUATION = frozenset(string.punctuation)


def parse_answers(
    text: str, delimiter: str = ANSWER_DELIMITER, *, keep_repeats: bool = False
) -> list[str]:
    """Split a generated text into answers; part of the definition of every answer metric.

    Cuts at line ends and at the delimiter without its surrounding spaces, strips each part,
    drops empty parts and all but the first of equal ones. Order is kept.

    Args:
        text: the generated text.
        delimiter: what the training target puts between answers. Only white space means that
            only line ends cut.
        keep_repeats: leave repeated answers in, for the rog family, which counts each line.

    Returns:
        The answers; empty for a text without any.
    """
    mark = delimiter.strip()
    lines = text.replace("\r", "\n").split("\n")
    parts = (part.strip() for line in lines for part in (line.split(mark) if mark else (line,)))
    answers = [part for part in parts if part]
    return answers if keep_repeats else list(dict.fromkeys(answers))


def strict_key(text: str) -> str:
    """Fold an answer for comparison as a whole, so that "US" never matches inside "Russia".

    NFKC and case folding; invisible format characters dropped; Unicode and ASCII punctuation to
    spaces; the words a, an and the removed unless nothing else is left; white space collapsed.
    Accents stay. A text that folds to nothing, such as "!!!", is kept as written, stripped.
    """
    visible = "".join(char for char in text if unicodedata.category(char) != "Cf")
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", visible).casefold())
    spaced = "".join(" " if _is_punctuation(char) else char for char in folded)
    words = spaced.split()
    return " ".join([w for w in words if w not in _ARTICLES] or words) or text.strip()


def strict_scores(predictions: Sequence[str], golds: Sequence[str]) -> dict[str, float]:
    """Score one question by equality of folded answers, as sets, hence one to one.

    Args:
        predictions: parsed answers, best first.
        golds: the gold answers; equal ones count once.

    Returns:
        `strict-hits@1` (first prediction is a gold), `strict-hit` (any is), `strict-f1`,
        `strict-precision`, `strict-recall`, `strict-exact` (the sets are equal). All within
        0 and 1, and all 0 without predictions or without golds.
    """
    wanted = {strict_key(gold) for gold in golds}
    keys = list(dict.fromkeys(strict_key(prediction) for prediction in predictions))
    if not wanted or not keys:
        return dict.fromkeys(STRICT_NAMES, 0.0)
    precision, recall, f1 = _set_prf(set(keys), wanted)
    first = float(keys[0] in wanted)
    values = (first, float(f1 > 0), f1, precision, recall, float(set(keys) == wanted))
    return dict(zip(STRICT_NAMES, values, strict=True))


def score_question(
    predictions: Sequence[str], golds: Sequence[str], *, question: str = ""
) -> dict[str, float]:
    """Score the parsed answers of one question in the families strict, rog and subgraphrag.

    Each published evaluator is given the answers in its own layout: one a line, for SubgraphRAG
    after "ans: ". A question without a prediction is wrong in every family, although the
    published evaluators grant a point for some empty outputs.

    Args:
        predictions: answers as `parse_answers` returns them. Repeats change only the rog family,
            whose published numbers include them: without them its F1 comes out higher.
        golds: the gold answers; without any, all scores are 0.
        question: text of the question, read by the subgraphrag family only.

    Returns:
        Metric name to value; the same names for every question.

    Raises:
        ValueError: a text was given where a list of texts is meant.
    """
    for name, value in (("predictions", predictions), ("golds", golds)):
        if isinstance(value, str):
            raise ValueError(f"{name} must be a list of answers, not the text {value!r}")
    rog = rog_scores("\n".join(predictions), golds)
    marked = "\n".join(f"ans: {answer}" for answer in predictions)
    published = rog | subgraphrag_scores(marked, golds, question)
    if not predictions:
        published = dict.fromkeys(published, 0.0)
    return strict_scores(predictions, golds) | published


def retrieval_prf(
    selected: Iterable[Hashable], positive: Iterable[Hashable]
) -> tuple[float, float, float]:
    """Compare selected facts with the positive ones, both as sets.

    Args:
        selected: fact indices that were retrieved.
        positive: fact indices labelled as evidence.

    Returns:
        Precision, recall and F1. All are 1 when both sets are empty, since nothing was sought
        and nothing claimed, and 0 when only one is.
    """
    return _set_prf(set(selected), set(positive))


def answer_recall_at_k(
    ranked_entities: Sequence[Iterable[Hashable]], answers: Iterable[Hashable], k: int
) -> float:
    """Return the share of distinct answers among the entities of the first k facts.

    Args:
        ranked_entities: for each fact, best first, its entities; ids or names as in `answers`.
        answers: gold entities, those outside the graph included. None at all gives 0.
        k: facts to look at, at least 0; more than there are means all.

    Raises:
        ValueError: k is negative.
    """
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")
    wanted = set(answers)
    seen = {entity for entities in ranked_entities[:k] for entity in entities}
    return len(wanted & seen) / len(wanted) if wanted else 0.0


def answer_hit_at_k(
    ranked_entities: Sequence[Iterable[Hashable]], answers: Iterable[Hashable], k: int
) -> float:
    """Return 1 if any answer is among the entities of the first k facts, else 0.

    Arguments and errors are those of `answer_recall_at_k`.
    """
    return float(answer_recall_at_k(ranked_entities, answers, k) > 0)


def _is_punctuation(char: str) -> bool:
    """Whether a character is punctuation by Unicode, or one of the ASCII symbols such as "+"."""
    return char in _ASCII_PUNCTUATION or unicodedata.category(char).startswith("P")


def _set_prf(
    found: AbstractSet[Hashable], wanted: AbstractSet[Hashable]
) -> tuple[float, float, float]:
    """Return precision, recall and F1 of two sets; 1 for two empty ones, 0 for one empty."""
    if not found and not wanted:
        return 1.0, 1.0, 1.0
    num_right = len(found & wanted)
    if not num_right:
        return 0.0, 0.0, 0.0
    f1 = 2 * num_right / (len(found) + len(wanted))
    return num_right / len(found), num_right / len(wanted), f1
