"""Parser, strict scores and retrieval scores: known cases and properties."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from dragkit.eval import (
    answer_recall_at_k,
    average_precision,
    parse_answers,
    retrieval_prf,
    rog_scores,
    score_question,
    strict_key,
    strict_scores,
)

ANSWERS = st.text(st.characters(exclude_characters="|\r\n", exclude_categories=["Cs"]), max_size=8)
SPOKEN = ANSWERS.map(str.strip).filter(bool)
WORDS = st.sampled_from(
    ["The", "a", "US", "Russia", "1", "1981", "!!!", "Oslo", "oslo", "New York"]
)
MANY = st.lists(WORDS | SPOKEN, max_size=6)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Oslo | Rome", ["Oslo", "Rome"]),
        ("Oslo|Rome", ["Oslo", "Rome"]),
        ("Oslo\nRome | Lima", ["Oslo", "Rome", "Lima"]),
        ("Oslo\r\nRome\rLima", ["Oslo", "Rome", "Lima"]),
        (" | | Oslo || ", ["Oslo"]),
        ("b | a | b | a | B", ["b", "a", "B"]),
        ("Washington, D.C.", ["Washington, D.C."]),
        ("", []),
        (" \n\t| \n", []),
        # A bar after a backslash belongs to the answer.
        (r"red\|blue | \| | C:\dir", ["red|blue", "|", r"C:\dir"]),
        ("a\\\\|b\\\\\\|c", ["a\\", "b\\|c"]),
        ("end\\ | \\\nnext", ["end\\", "\\", "next"]),
    ],
)
def test_parse_answers(text: str, expected: list[str]) -> None:
    assert parse_answers(text) == expected


def test_parse_answers_can_keep_repeats() -> None:
    assert parse_answers("b | a\nb", keep_repeats=True) == ["b", "a", "b"]


@pytest.mark.parametrize(
    "text, key",
    [
        ("The New  York-Times", "new york times"),
        ("The", "the"),
        ("the a", "the a"),
        ("Theatre", "theatre"),
        ("C++", "c++"),
        ("snake_case", "snake case"),
        ("  ?! ", "?!"),
        ("\u00abOslo\u00bb\u3002", "oslo"),
        ("\u2665", "\u2665"),
        ("na\u00efve", "na\u00efve"),
        ("soft\u00adhyphen", "softhyphen"),
        ("\ufb01ve \u2460", "five 1"),
        ("null", "null"),
    ],
)
def test_strict_key(text: str, key: str) -> None:
    assert strict_key(text) == key


@pytest.mark.parametrize(
    "texts",
    [
        ["AB+", "AB-", "AB"],
        ["C", "C++", "C#", "C*"],
        ["-5", "5", "<5", ">5", "<=5", "5%"],
        ["-0.5", "0.5"],
        ["-.5", ".5"],
        ["-$5", "$5"],
        ["$-5", "$5"],
        ["UTC+05:30", "UTC-05:30"],
        ["F# minor", "F minor"],
        ["Ca2+", "Ca2-", "Ca2"],
        ["1e-5", "1e5", "1e+5"],
        ["10^-6", "10^6"],
        ["12.5, -3", "12.5, 3"],
        ["Sagittarius A*", "Sagittarius A"],
        ["AB +", "AB -", "AB"],
        ["Rh(D)-", "Rh(D)+", "Rh(D)"],
        ["Rh (+)", "Rh (-)", "Rh"],
        ["(+)-camphor", "(-)-camphor", "camphor"],
        ["x", "-x"],
        ["-ve", "+ve"],
        ["-\N{INFINITY}", "\N{INFINITY}"],
        [".NET", "NET"],
        ["$5", "5", "\N{EURO SIGN}5"],
        ["R$", "R"],
        ["C", "C--", "C-"],
        [".5", "5", "-.5"],
    ],
)
def test_a_sign_that_carries_meaning_makes_another_answer(texts: list[str]) -> None:
    assert len(set(map(strict_key, texts))) == len(texts)
    for text in texts:
        right = [strict_scores([text], [gold])["strict-exact"] for gold in texts]
        assert right == [float(text == gold) for gold in texts]


@pytest.mark.parametrize(
    "texts",
    [
        [
            "AB-",
            "ab-",
            "AB\N{MINUS SIGN}",
            "AB\N{EN DASH}",
            "AB\N{NON-BREAKING HYPHEN}",
            "AB\N{FULLWIDTH HYPHEN-MINUS}",
            "(AB-)",
            "AB-.",
            "**AB-**",
        ],
        ["C++", "c++.", '"C++"', "C\N{FULLWIDTH PLUS SIGN}+"],
        ["-5", "\N{MINUS SIGN}5", "\N{EN DASH}5", "\N{HYPHEN}5", "(-5)", "'-5'", "-5.", "**-5**"],
        ["-$5", "\N{EN DASH}$5"],
        ["$5", "5$", "5 $", "$5.", "(\N{FULLWIDTH DOLLAR SIGN}5)", "'$5'"],
        ["\N{EURO SIGN}1,000.50", "1,000.50 \N{EURO SIGN}"],
        ["AB -", "AB-", "AB \N{MINUS SIGN}", "(AB -)", "ab  -"],
        ["Rh(D)-", "Rh(D)\N{MINUS SIGN}.", "rh (d)-"],
        [".5", "0.5"],
        [".NET", '".NET"', ".net", "(.NET)"],
        ["-x", "\N{MINUS SIGN}x", "(-x)", "-x."],
        ["5%", "5 %", "(5%)"],
        ["5", "+5", "#5", "5-", "5*", "**5**", "->5", "> 5", "- 5"],
        ["Paris", "- Paris", "**Paris**", "*Paris*", "Paris*", "# Paris", "> Paris", "=Paris"],
        ["Paris", "-Paris", "Paris -", "Paris.", "...Paris", "Paris --"],
        ["x", "- x", "$x$", "a x", "- a x", "-a x"],
        ["A Paris", "*A* Paris", "**A** Paris", "(A) Paris"],
        ["well-known", "well known", "well\N{NON-BREAKING HYPHEN}known", "well--known"],
        ["1990-2000", "1990 2000", "1990\N{EN DASH}2000", "1990 - 2000"],
        ["F-16", "F 16", "f/16"],
        ["2005-01-31", "2005/01/31", "2005.01.31"],
        ["x+y", "x + y", "x y"],
    ],
)
def test_other_punctuation_changes_no_answer(texts: list[str]) -> None:
    assert set(map(strict_key, texts)) == {strict_key(texts[0])}


@settings(max_examples=200, deadline=None)
@given(MANY, MANY, st.randoms(use_true_random=False))
def test_strict_scores_are_bounded_consistent_and_ignore_gold_order(
    predictions: list[str], golds: list[str], rng: random.Random
) -> None:
    scores = strict_scores(predictions, golds)
    assert all(0.0 <= value <= 1.0 for value in scores.values())
    shuffled = golds.copy()
    rng.shuffle(shuffled)
    assert strict_scores(predictions, shuffled) == scores
    rog, shuffled_rog = (rog_scores("\n".join(predictions), order) for order in (golds, shuffled))
    assert rog == shuffled_rog
    # Scores compare sets, so a repeated gold answer changes nothing.
    assert strict_scores(predictions, golds + golds[:1]) == scores
    precision, recall = scores["strict-precision"], scores["strict-recall"]
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    assert scores["strict-f1"] == pytest.approx(f1)
    assert scores["strict-exact"] <= scores["strict-hits@1"] <= scores["strict-hit"]
    assert (scores["strict-exact"] == 1.0) == (scores["strict-f1"] == 1.0)


@settings(max_examples=200, deadline=None)
@given(st.lists(SPOKEN, min_size=1, max_size=6))
def test_perfect_answer_scores_one(golds: list[str]) -> None:
    scores = score_question(parse_answers(" " + " | ".join(golds)), golds)
    strict = {name: value for name, value in scores.items() if name.startswith("strict-")}
    assert set(strict.values()) == {1.0}
    assert scores["rog-hit"] == scores["rog-hits@1"] == scores["rog-recall"] == 1.0


@pytest.mark.parametrize("text", ["1", "1 ", "ab ", "ab)", "$", "-", "(+", ".", "1.,$", "AB -"])
def test_a_key_of_any_text_takes_linear_time(text: str) -> None:
    begun = time.monotonic()
    strict_key(text * 10**5)
    strict_key(text[0] + text[1:] * 10**5)
    assert time.monotonic() - begun < 5


def test_ten_thousand_answers_are_scored() -> None:
    golds = [f"entity {index}" for index in range(10_000)]
    scores = strict_scores(golds[::-1][:5_000] + ["other"] * 5_000, golds)
    assert scores["strict-recall"] == 0.5
    assert scores["strict-precision"] == 5_000 / 5_001


@pytest.mark.parametrize(
    "selected, positive, expected",
    [
        ([1, 2, 3, 4], [3, 4, 5], (1 / 2, 2 / 3, 4 / 7)),
        ([1, 1, 2], [1], (1 / 2, 1.0, 2 / 3)),
        ([7], [7], (1.0, 1.0, 1.0)),
        ([1], [2], (0.0, 0.0, 0.0)),
        ([], [2], (0.0, 0.0, 0.0)),
        ([1], [], (0.0, 0.0, 0.0)),
        ([], [], (1.0, 1.0, 1.0)),
    ],
)
def test_retrieval_prf(
    selected: list[int], positive: list[int], expected: tuple[float, float, float]
) -> None:
    assert retrieval_prf(selected, positive) == pytest.approx(expected)


@pytest.mark.parametrize("k, recall", [(0, 0.0), (1, 0.0), (2, 1 / 3), (3, 2 / 3), (99, 2 / 3)])
def test_answer_recall_at_k(k: int, recall: float) -> None:
    facts = [("x", "y"), ("x", "a"), ("a", "b")]
    answers = ["a", "b", "outside", "a"]
    assert answer_recall_at_k(facts, answers, k) == pytest.approx(recall)
    assert answer_recall_at_k([("a", "b")], [], 1) == 0.0
    assert answer_recall_at_k([], ["a"], 5) == 0.0


def test_negative_k_is_refused() -> None:
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        answer_recall_at_k([("a", "b")], ["a"], -1)


@pytest.mark.parametrize(
    ("positive", "scores", "expected"),
    [
        # Positives at ranks 1 and 3: 1/2 * 1/1 + 1/2 * 2/3.
        ([0, 2], [0.9, 0.8, 0.7, 0.1], 5 / 6),
        ([3], [0.9, 0.8, 0.7, 0.1], 1 / 4),
        ([0, 1, 2, 3], [0.9, 0.8, 0.7, 0.1], 1.0),
        # Facts of equal score count at once, whichever stands first: 1 * 1/2.
        ([0], [0.5, 0.5, 0.2], 1 / 2),
        ([1], [0.5, 0.5, 0.2], 1 / 2),
        # 1/2 * 1/2 + 1/2 * 2/3.
        ([1, 2], [0.5, 0.5, 0.2], 7 / 12),
        ([0], [0.0], 1.0),
        ([], [0.5, 0.2], 0.0),
        ([], [], 0.0),
    ],
)
def test_average_precision_by_hand(
    positive: list[int], scores: list[float], expected: float
) -> None:
    assert average_precision(range(len(scores)), scores, positive) == pytest.approx(expected)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_average_precision_equals_scikit_learn(facts: list[tuple[int, bool]]) -> None:
    facts[0] = (facts[0][0], True)
    order = sorted(range(len(facts)), key=lambda fact: -facts[fact][0])
    positive = [fact for fact, (_, is_positive) in enumerate(facts) if is_positive]
    value = average_precision(order, [facts[fact][0] for fact in order], positive)
    expected = average_precision_score([p for _, p in facts], [score for score, _ in facts])
    assert value == pytest.approx(expected)
