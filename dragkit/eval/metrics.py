"""Metrics of one question: the answer parser, the strict scores and the retrieval scores.

`published_metrics.py` holds the scores that only serve comparison with published tables.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Hashable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from itertools import groupby
from operator import itemgetter

from dragkit.data.names import read_names
from dragkit.eval.published_metrics import rog_scores, subgraphrag_scores

# Raise this when a change of the parser, a normalisation or a formula can change a number.
METRIC_VERSION = 3

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
# Texts write a minus sign as any of these: hyphen, figure dash, en dash, minus.
_MINUS_SIGNS = dict.fromkeys(map(ord, "\u2010\u2012\u2013\u2212"), "-")
# NFKC has folded the wide forms. Other currencies are no ASCII punctuation, so all of them stay.
_CURRENCY = r"$¢£¤¥฿\u20a0-\u20cf"
_SPACED_AMOUNT = re.compile(rf"(?<![\w.,{_CURRENCY}])(\d[\d.,]*)\s*([{_CURRENCY}])(?!\w)")
_BARE_FRACTION = re.compile(r"(?<![\w.])\.(?=\d)")
# What may stand before a sign that begins a word. Not a letter, so not within 1990-2000 or F-16.
_BEFORE = r"(?<![^\s(\[{<>=^/,;:|\"'“‘«$€£¥*_`])"
# The group is a sign that carries meaning. Other punctuation separates words or adorns them.
_SIGN = re.compile(
    r"("
    # In front of a number: -5, (-5), $-5, <5, >=5. Not within 5%-10% or ->5.
    rf"{_BEFORE}-(?=[$€£¥]?[.,]?\d)"
    r"|(?<![-=])[<>]=?(?=-?[.,]?\d)"
    # In front of a symbol: -x, -ve. Not - x or -Paris, which are items of a list, nor -a friend.
    rf"|{_BEFORE}-(?=(?!an?\b)[^\W\d_]{{1,2}}(?!\w)|∞)"
    # In front of a word: .NET. Not in "end.Start" or "...so".
    rf"|{_BEFORE}\.(?=[^\W\d_]\w)"
    # In front of an amount: $5, US$5.
    r"|\$(?=-?[.,]?\d)"
    # Behind a word, or between it and a number: AB+, C++, F#, UTC+5. Not within A+B.
    r"|(?<=[^\W_])[+#]+(?![^\W\d_]|[+#])"
    # Behind a word with a letter: AB-, SO42-. Not behind 1990-, nor within well-known.
    r"|(?<=[^\W\d_])\d*-(?![\w-])"
    # Behind a bracket, or as the last word behind a short one: Rh(D)-, AB +. Not in "Paris -".
    r"|(?<=[^\W_])[)\]]+[+-](?![\w+-])"
    r"|(?<=(?<!\w)[^\W\d_])\s+[+-](?=[\s)\]]*$)|(?<=(?<!\w)[^\W\d_]\w)\s+[+-](?=[\s)\]]*$)"
    # Alone in brackets: (+)-camphor, Rh(-).
    r"|(?<=[(\[])[+-](?=[)\]])"
    # Behind a number: 5%. Behind a single letter: A*, R$, C--. Not in **A** or $x$.
    r"|(?<=\d)\s*%|(?<=(?<![\w*$])[^\W\d_])(?:[*$]|--)(?![\w*$-])"
    r")"
)


def parse_answers(text: str, *, keep_repeats: bool = False) -> list[str]:
    """Splits a generated text into answers. Every answer metric depends on this parser.

    The text is split at line ends and at bars, except at a bar after a backslash, which belongs to
    an answer, see `dragkit.data.names.written_name`. Each part is stripped. Empty parts and
    repeated answers are dropped. The order is kept.

    Args:
        text: the generated text.
        keep_repeats: keeps repeated answers. The rog scores count each line.
    """
    lines = text.replace("\r", "\n").split("\n")
    answers = [answer for line in lines for answer in read_names(line)]
    return answers if keep_repeats else list(dict.fromkeys(answers))


def strict_key(text: str) -> str:
    """Normalises an answer. Strict scores compare whole keys, so "US" does not match "Russia".

    Format characters (category Cf) are dropped. NFKC and case folding are applied. Punctuation
    becomes spaces, except a sign that carries meaning: "AB-" is not "AB+", "-5" is not "5", "C++"
    is not "C", ".NET" is not "NET", and neither "5%" nor "$5" is "5". Of these "Rh(D)-" and "AB -"
    are written as one word, "5 $" as "$5", and ".5" as "0.5". A minus sign, also one written as a
    dash, is a hyphen. The words a, an and the are removed unless nothing else is left. White space
    is collapsed. Accents stay. A text without any key, such as "!!!", keeps its characters.
    """
    visible = "".join(char for char in text if unicodedata.category(char) != "Cf")
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", visible).casefold())
    plain = _SPACED_AMOUNT.sub(r"\2\1", folded.translate(_MINUS_SIGNS))
    # Every second piece is a sign.
    pieces = _SIGN.split(_BARE_FRACTION.sub("0.", plain))
    pieces[::2] = map(_without_punctuation, pieces[::2])
    pieces[1::2] = (sign.strip(" \t\n)]") for sign in pieces[1::2])
    words = "".join(pieces).split()
    return " ".join([w for w in words if w not in _ARTICLES] or words) or " ".join(text.split())


def strict_scores(predictions: Sequence[str], golds: Sequence[str]) -> dict[str, float]:
    """Scores one question by comparing the sets of normalised answers.

    Args:
        predictions: parsed answers, best first.
        golds: the gold answers. Equal ones count once.

    Returns:
        `strict-hits@1` (the first prediction is a gold answer), `strict-hit` (any is),
        `strict-f1`, `strict-precision`, `strict-recall` and `strict-exact` (the sets are equal).
        All are between 0 and 1. All are 0 without predictions or without gold answers.
    """
    gold_keys = {strict_key(gold) for gold in golds}
    keys = list(dict.fromkeys(strict_key(prediction) for prediction in predictions))
    if not gold_keys or not keys:
        return dict.fromkeys(STRICT_NAMES, 0.0)
    precision, recall, f1 = _set_prf(set(keys), gold_keys)
    hits_at_1 = float(keys[0] in gold_keys)
    values = (hits_at_1, float(f1 > 0), f1, precision, recall, float(set(keys) == gold_keys))
    return dict(zip(STRICT_NAMES, values, strict=True))


def score_question(
    predictions: Sequence[str], golds: Sequence[str], *, question: str = ""
) -> dict[str, float]:
    """Computes the strict, rog and subgraphrag scores of one question.

    Each published evaluator gets the answers in its own format: one per line, for SubgraphRAG
    after "ans: ". A question without a prediction scores 0 in every family, although the published
    evaluators count some empty outputs as right.

    Args:
        predictions: answers as `parse_answers` returns them. Repeats only change the rog scores.
            The published rog numbers include repeats, which lower F1.
        golds: the gold answers. Without any, all scores are 0.
        question: text of the question. Only the subgraphrag scores read it.

    Returns:
        Value of each metric. The names are the same for every question.

    Raises:
        ValueError: an argument is a text instead of a list of texts.
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
    """Computes precision, recall and F1 of the set of selected facts.

    All are 1 if both sets are empty, and 0 if only one is.

    Args:
        selected: indices of the retrieved facts.
        positive: indices of the positive facts.
    """
    return _set_prf(set(selected), set(positive))


def average_precision(
    ranked: Sequence[Hashable], scores: Sequence[float], positive: Iterable[Hashable]
) -> float:
    """Computes the average precision of a ranking, as scikit-learn defines it.

    It is the sum over the distinct scores of (recall at that score - recall before) * (precision
    at that score). Facts of equal score count at once, so their order is irrelevant.

    Args:
        ranked: facts, best first.
        scores: their scores, falling.
        positive: the positive facts. Without any the result is 0.
    """
    positives = set(positive)
    num_seen = num_found = 0
    total = 0.0
    for _, tied in groupby(zip(scores, ranked, strict=True), key=itemgetter(0)):
        hits = [fact in positives for _, fact in tied]
        num_seen += len(hits)
        num_found += sum(hits)
        total += sum(hits) * num_found / num_seen
    return total / len(positives) if positives else 0.0


def answer_recall_at_k(
    ranked_entities: Sequence[Iterable[Hashable]], answers: Iterable[Hashable], k: int
) -> float:
    """Computes the fraction of distinct answers that occur in the first k facts.

    Args:
        ranked_entities: entities of each fact, best fact first, as ids or names like `answers`.
        answers: gold entities, including those outside the graph. Without any the result is 0.
        k: number of facts, at least 0.

    Raises:
        ValueError: k is negative.
    """
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")
    golds = set(answers)
    retrieved = {entity for entities in ranked_entities[:k] for entity in entities}
    return len(golds & retrieved) / len(golds) if golds else 0.0


def _without_punctuation(text: str) -> str:
    """Replaces Unicode punctuation and ASCII symbols, such as "=", by spaces."""
    return "".join(
        " " if char in _ASCII_PUNCTUATION or unicodedata.category(char).startswith("P") else char
        for char in text
    )


def _set_prf(
    selected: AbstractSet[Hashable], positive: AbstractSet[Hashable]
) -> tuple[float, float, float]:
    """Returns precision, recall and F1, all 1 for two empty sets and 0 for one empty set."""
    if not selected and not positive:
        return 1.0, 1.0, 1.0
    num_right = len(selected & positive)
    if not num_right:
        return 0.0, 0.0, 0.0
    f1 = 2 * num_right / (len(selected) + len(positive))
    return num_right / len(selected), num_right / len(positive), f1
