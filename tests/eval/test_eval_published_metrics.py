"""Scores of single questions computed by hand for every family, including published faults."""

from __future__ import annotations

import pytest

from dragkit.eval import (
    rearev_scores,
    rog_scores,
    score_question,
    score_text,
    subgraphrag_scores,
)

THIRD, TWO_THIRDS, FOUR_THIRDS = 1 / 3, 2 / 3, 4 / 3
S_ONE, ONE = (1, 1, 1, 1, 1, 1), (1, 1, 1, 1, 1)
S_ZERO, ZERO = (0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0)
FIRST_OF_TWO = (1, 1, 0.5, 1, TWO_THIRDS)
HALF_FOUND = (1, 1, 1, 0.5, TWO_THIRDS)

# Columns: text, golds, question, then scores by family:
#   strict: hits@1, hit, precision, recall, f1, exact
#   rog, subgraphrag: hit, hits@1, precision, recall, f1
CASES = {
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
PARTS = ("hit", "hits@1", "precision", "recall", "f1")
STRICT_PARTS = ("hits@1", "hit", "precision", "recall", "f1", "exact")


@pytest.mark.parametrize("name", CASES)
def test_hand_computed_case(name: str) -> None:
    text, golds, question, strict, rog, subgraphrag = CASES[name]
    expected = {f"strict-{part}": value for part, value in zip(STRICT_PARTS, strict, strict=True)}
    expected |= {f"rog-{part}": value for part, value in zip(PARTS, rog, strict=True)}
    expected["rog-accuracy"] = expected["rog-recall"]
    expected |= {f"subgraphrag-{p}": value for p, value in zip(PARTS, subgraphrag, strict=True)}
    scores = score_text("q", text, golds, question=question).scores
    assert dict(scores) == pytest.approx(expected, abs=1e-12)


def test_published_evaluators_count_some_empty_texts_as_right() -> None:
    assert rog_scores("", ["The"])["rog-hit"] == 1.0
    assert subgraphrag_scores("", ["Paris"], "where is it")["subgraphrag-hit"] == 1.0
    assert subgraphrag_scores("", ["Paris"], "which city")["subgraphrag-hit"] == 0.0
    assert not any(score_question([], ["The"], question="where is it").values())


def test_subgraphrag_hit_reads_the_whole_text_without_a_mark() -> None:
    scores = subgraphrag_scores("It is Paris", ["Paris"])
    assert scores["subgraphrag-hit"] == 1.0
    assert scores["subgraphrag-hits@1"] == scores["subgraphrag-f1"] == 0.0
    marked = subgraphrag_scores("It may be Paris\nans: Rome", ["Paris"])
    assert not any(marked.values())


def test_the_lenient_rule_reads_what_follows_the_last_mark() -> None:
    scores = subgraphrag_scores("ans: x ans: Lond", ["London"], "where")
    assert scores["subgraphrag-hits@1"] == scores["subgraphrag-f1"] == 1.0


def test_only_inner_blank_lines_lower_the_rog_precision() -> None:
    assert rog_scores("\n\nOslo\n", ["Oslo"])["rog-precision"] == 1.0
    assert rog_scores("Oslo\n\nRome", ["Oslo"])["rog-precision"] == pytest.approx(THIRD)


@pytest.mark.parametrize("predictions, golds", [("Paris", ["Paris"]), (["Paris"], "Paris")])
def test_a_text_instead_of_a_list_is_refused(predictions: object, golds: object) -> None:
    with pytest.raises(ValueError, match="must be a list of answers"):
        score_question(predictions, golds)


# Entities are 0, 1, 2, ... Columns: probabilities, golds, topics, max_nodes, and
# (hits@1, f1, precision, recall, em).
REAREV_CASES = {
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


@pytest.mark.parametrize("name", REAREV_CASES)
def test_rearev_case(name: str) -> None:
    probabilities, golds, topics, max_nodes, expected = REAREV_CASES[name]
    entities = list(range(len(probabilities)))
    scores = rearev_scores(entities, probabilities, golds, topics=topics, max_nodes=max_nodes)
    parts = ("hits@1", "f1", "precision", "recall", "em")
    assert scores == pytest.approx(
        {f"rearev-{part}": value for part, value in zip(parts, expected, strict=True)}
    )


def test_rearev_collects_until_the_mass_is_exceeded_and_sizes_must_agree() -> None:
    assert rearev_scores(["a", "b"], [0.5, 0.5], ["a"], mass=0.5)["rearev-precision"] == 0.5
    with pytest.raises(ValueError, match="2 entities but 1 probabilities"):
        rearev_scores([0, 1], [1.0], [0])
