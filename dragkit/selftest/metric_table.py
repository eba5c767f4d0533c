"""Scores of single questions computed by hand for every family, including published faults."""

from __future__ import annotations

from collections.abc import Sequence

from dragkit.eval import rearev_scores, score_text
from dragkit.selftest.outcome import Outcome, require

Case = tuple[str, list[str], str, Sequence[float], Sequence[float], Sequence[float]]
RearevCase = tuple[list[float], list[int], list[int], int | None, Sequence[float]]

THIRD, TWO_THIRDS, FOUR_THIRDS = 1 / 3, 2 / 3, 4 / 3
S_ONE, ONE = (1, 1, 1, 1, 1, 1), (1, 1, 1, 1, 1)
S_ZERO, ZERO = (0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0)
FIRST_OF_TWO = (1, 1, 0.5, 1, TWO_THIRDS)
HALF_FOUND = (1, 1, 1, 0.5, TWO_THIRDS)

# Columns: text, golds, question, then scores by family:
#   strict: hits@1, hit, precision, recall, f1, exact
#   rog, subgraphrag: hit, hits@1, precision, recall, f1
CASES: dict[str, Case] = {
    "equal": ("Paris", ["Paris"], "", S_ONE, ONE, ONE),
    "wrong": ("Lyon", ["Paris"], "", S_ZERO, ZERO, ZERO),
    "all, other order": ("Oslo | Bergen", ["Bergen", "Oslo"], "", S_ONE, ONE, ONE),
    "one of two golds": (
        *("Oslo", ["Oslo", "Bergen"], ""),
        *((1, 1, 1, 0.5, TWO_THIRDS, 0), HALF_FOUND, HALF_FOUND),
    ),
    "one too many": (
        *("Oslo | Rome", ["Oslo"], ""),
        *((*FIRST_OF_TWO, 0), FIRST_OF_TWO, FIRST_OF_TWO),
    ),
    "right one second": (
        *("Rome | Oslo", ["Oslo"], ""),
        *((0, 1, 0.5, 1, TWO_THIRDS, 0), (1, 0, 0.5, 1, TWO_THIRDS), (1, 0, 0.5, 1, TWO_THIRDS)),
    ),
    "three golds, wrong delimiter": (
        *("Oslo, Rome, Lima", ["Oslo", "Rome", "Lima"], ""),
        *(S_ZERO, (1, 1, 3, 1, 1.5), (1, 1, 1, THIRD, 0.5)),
    ),
    "three golds, delimiter": ("Oslo | Rome | Lima", ["Oslo", "Rome", "Lima"], "", S_ONE, ONE, ONE),
    "gold The against junk": ("Zurich", ["The"], "", S_ZERO, ONE, ONE),
    "gold !!! against junk": ("Zurich", ["!!!"], "", S_ZERO, ONE, ONE),
    "gold !!! found": ("!!!", ["!!!"], "", S_ONE, ONE, ONE),
    "gold ??? is not !!!": ("!!!", ["???"], "", S_ZERO, ONE, ONE),
    "gold inside a word": ("Russia", ["US"], "", S_ZERO, ONE, ONE),
    "gold inside a number": ("1981", ["1"], "", S_ZERO, ONE, ONE),
    "prediction inside gold": ("US", ["Russia"], "who", S_ZERO, ZERO, ZERO),
    "lenient where": ("London", ["City of London"], "Where was he born?", S_ZERO, ZERO, ONE),
    "same, not where": ("London", ["City of London"], "Which city?", S_ZERO, ZERO, ZERO),
    "year cut": ("1969", ["1969-07-20"], "When did it land?", S_ZERO, ZERO, ONE),
    "lenient, year not cut": ("1969", ["1969-07-20"], "which year is it", S_ZERO, ZERO, ONE),
    "year not asked for": ("1969", ["1969-07-20"], "on which date", S_ZERO, ZERO, ZERO),
    "empty output": ("", ["Paris"], "", S_ZERO, ZERO, ZERO),
    "delimiters only": (" | \n |", ["Paris"], "", S_ZERO, ZERO, ZERO),
    "empty output, gold The": ("", ["The"], "", S_ZERO, ZERO, ZERO),
    "empty output, where": ("", ["Paris"], "where is it", S_ZERO, ZERO, ZERO),
    "no gold": ("Paris", [], "", S_ZERO, ZERO, ZERO),
    "no gold, no output": ("", [], "", S_ZERO, ZERO, ZERO),
    "repeated": ("Oslo | Oslo", ["Oslo"], "", S_ONE, FIRST_OF_TWO, ONE),
    "repeated, other case": ("Oslo | OSLO", ["Oslo"], "", S_ONE, FIRST_OF_TWO, FIRST_OF_TWO),
    "gold given twice": ("Oslo", ["Oslo", "Oslo"], "", S_ONE, (1, 1, 2, 1, FOUR_THIRDS), ONE),
    "article": ("the Beatles", ["Beatles"], "", S_ONE, ONE, ONE),
    "article in gold": ("Beatles", ["The Beatles"], "", S_ONE, ONE, ONE),
    "articles only": ("A", ["The"], "", S_ZERO, ONE, ONE),
    "case of an accent": ("BEYONC\u00c9", ["Beyonc\u00e9"], "", S_ONE, ONE, ONE),
    "accent composed": ("Beyonce\u0301", ["Beyonc\u00e9"], "", S_ONE, ZERO, ZERO),
    "accent missing": ("Beyonce", ["Beyonc\u00e9"], "", S_ZERO, ZERO, ZERO),
    "full width": ("\uff30\uff41\uff52\uff49\uff53", ["Paris"], "", S_ONE, ZERO, ZERO),
    "sharp s": ("STRASSE", ["Stra\u00dfe"], "", S_ONE, ZERO, ZERO),
    "zero width": ("Pa\u200bris", ["Paris"], "", S_ONE, ZERO, ZERO),
    "apostrophe to space": ("O'Neal", ["O Neal"], "", S_ONE, ZERO, ZERO),
    "apostrophe deleted": ("ONeal", ["O'Neal"], "", S_ZERO, ONE, ONE),
    "en dash": ("Jean\u2013Paul", ["Jean Paul"], "", S_ONE, ZERO, ZERO),
    "pad token stays": ("<pad> Paris", ["Paris"], "", S_ZERO, ONE, ONE),
    "pad token as answer": ("<pad>", ["Pad"], "", S_ONE, ONE, ONE),
    "gold across lines": (
        *("New\nYork", ["New York"], ""),
        *(S_ZERO, (1, 0, 0.5, 1, TWO_THIRDS), ZERO),
    ),
    "none inside a name": ("Nonesuch", ["Nonesuch"], "", S_ONE, ONE, ZERO),
    "refusal as answer": ("Not available", ["Not available"], "", S_ONE, ONE, ZERO),
    "mark counts as text": ("Lima", ["Ans"], "", S_ZERO, ZERO, ONE),
    "one line, nested golds": (
        *("New York City", ["New York", "York"], ""),
        *(S_ZERO, (1, 1, 2, 1, FOUR_THIRDS), (1, 1, 1, 0.5, TWO_THIRDS)),
    ),
    "nested golds, both named": ("York | New York", ["York", "New York"], "", S_ONE, ONE, ONE),
    "greedy pairing takes the longest line": (
        *("York | York City", ["York", "City"], ""),
        *((1, 1, 0.5, 0.5, 0.5, 0), ONE, (1, 1, 0.5, 0.5, 0.5)),
    ),
    "another sign": ("AB -", ["AB +"], "", S_ZERO, ONE, ONE),
    "sign apart": ("AB -", ["AB-"], "", S_ONE, ONE, ONE),
    "amount": ("5", ["$5"], "", S_ZERO, ONE, ONE),
    "leading dot": ("NET", [".NET"], "", S_ZERO, ONE, ONE),
    "sentence": ("The answer is Paris.", ["Paris"], "", S_ZERO, ONE, ONE),
    "longer first": (
        *("Oslo Airport | Oslo", ["Oslo"], ""),
        *((0, 1, 0.5, 1, TWO_THIRDS, 0), FIRST_OF_TWO, FIRST_OF_TWO),
    ),
    "lenient language": (
        *("English | French", ["English Language"], "what language do they speak"),
        *(S_ZERO, ZERO, FIRST_OF_TWO),
    ),
    "blank lines": ("\n  Oslo  \r\n\n | Rome |\n", ["Oslo", "Rome"], "", S_ONE, ONE, ONE),
}
_PARTS = ("hit", "hits@1", "precision", "recall", "f1")
_STRICT_PARTS = ("hits@1", "hit", "precision", "recall", "f1", "exact")

# Entities are 0, 1, 2, ... Columns: probabilities, golds, topics, max_nodes, and
# (hits@1, f1, precision, recall, em).
REAREV_CASES: dict[str, RearevCase] = {
    "one sure answer": ([0.02, 0.97, 0.01], [1], [], None, (1, 1, 1, 1, 1)),
    "stops past the mass": ([0.6, 0.36, 0.04], [0, 1], [], 2, (1, 1, 1, 1, 1)),
    "goes on below the mass": ([0.5, 0.4, 0.1], [0], [], None, (1, 0.5, THIRD, 1, 1)),
    "topic left out": ([0.9, 0.06, 0.04], [1], [0], None, (1, TWO_THIRDS, 0.5, 1, 1)),
    "gold second": ([0.93, 0.05, 0.02], [1], [], None, (0, TWO_THIRDS, 0.5, 1, 1)),
    "gold after the mass": ([0.93, 0.05, 0.02], [2], [], None, (0, 0, 0, 0, 0)),
    "small one left out": ([0.9, 0.08, 0.02], [1], [0], 2, (1, 1, 1, 1, 1)),
    "same, larger split": ([0.9, 0.08, 0.02], [1], [0], 1000, (1, TWO_THIRDS, 0.5, 1, 1)),
    "gold outside the graph": ([0.97, 0.03], [0, 9], [], None, (1, TWO_THIRDS, 1, 0.5, 1)),
    "nothing collected": ([1.0], [5], [0], None, (0, 0, 1, 0, 0)),
    "empty graph": ([], [5], [], None, (0, 0, 1, 0, 0)),
    "no gold, something collected": ([0.97, 0.03], [], [], None, (1, 0, 0, 1, 1)),
    "no gold, nothing collected": ([1.0], [], [0], None, (1, 1, 1, 1, 1)),
    "tie keeps graph order": ([0.5, 0.5], [1], [], None, (0, TWO_THIRDS, 0.5, 1, 1)),
}
_REAREV_PARTS = ("hits@1", "f1", "precision", "recall", "em")
_TOLERANCE = 1e-12


def wrong_scores(name: str) -> dict[str, tuple[float, float]]:
    """The scores of a case of `CASES` that are not those computed by hand: actual and expected."""
    text, golds, question, strict, rog, subgraphrag = CASES[name]
    expected = {f"strict-{part}": x for part, x in zip(_STRICT_PARTS, strict, strict=True)}
    expected |= {f"rog-{part}": x for part, x in zip(_PARTS, rog, strict=True)}
    expected["rog-accuracy"] = expected["rog-recall"]
    expected |= {f"subgraphrag-{part}": x for part, x in zip(_PARTS, subgraphrag, strict=True)}
    return _differences(dict(score_text("q", text, golds, question=question).scores), expected)


def wrong_rearev_scores(name: str) -> dict[str, tuple[float, float]]:
    """`wrong_scores` for a case of `REAREV_CASES`."""
    probabilities, golds, topics, max_nodes, values = REAREV_CASES[name]
    entities = list(range(len(probabilities)))
    scores = rearev_scores(entities, probabilities, golds, topics=topics, max_nodes=max_nodes)
    expected = {f"rearev-{part}": x for part, x in zip(_REAREV_PARTS, values, strict=True)}
    return _differences(scores, expected)


def _differences(
    actual: dict[str, float], expected: dict[str, float]
) -> dict[str, tuple[float, float]]:
    pairs = {name: (actual.get(name, -1.0), expected.get(name, -1.0)) for name in actual | expected}
    return {name: (x, y) for name, (x, y) in pairs.items() if not abs(x - y) <= _TOLERANCE}


def metric_table(outcome: Outcome) -> None:
    """Scores every case of the tables.

    Args:
        outcome: counts the cases.
    """
    for cases, check in ((CASES, wrong_scores), (REAREV_CASES, wrong_rearev_scores)):
        for name in cases:  # type: ignore[attr-defined]
            with outcome.case(name):
                wrong = check(name)
                require(not wrong, f"score and expected score: {wrong}")
