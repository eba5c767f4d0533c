"""Invented questions about invented facts. A marker says which end of a fact is an answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dragkit.tiny.names import NameSource, invented_word
from dragkit.tiny.words import (
    DOMAINS,
    FORWARD_NOUN,
    FORWARD_PARTICIPLE,
    INVERSE_NOUN,
    INVERSE_PARTICIPLE,
    NOUNS,
    PARTICIPLES,
)

TAIL, HEAD, IRRELEVANT = "<tail>", "<head>", "<irr>"
MARKERS = (TAIL, HEAD, IRRELEVANT)
QUESTION_TYPES = ("forward", "inverse", "forward_list", "inverse_list", "two_hop")

LIST_LENGTHS, LENGTH_WEIGHTS = (2, 3, 4, 5, 6), (40, 28, 16, 10, 6)


@dataclass(frozen=True, slots=True)
class Relation:
    """A relation: `text` stands in facts and `question_text` in questions."""

    text: str
    question_text: str
    is_noun: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """One question with its facts.

    Attributes:
        question: text of the question.
        facts: (head, relation text, tail), in prompt order.
        markers: the right marker of each fact.
        answers: heads and tails that the markers name, in prompt order, without repeats.
    """

    question: str
    facts: tuple[tuple[str, str, str], ...]
    markers: tuple[str, ...]
    answers: tuple[str, ...]


def draw_relation(rng: random.Random) -> Relation:
    """Draws a listed or an invented relation, with or without a domain word before it."""
    chance = rng.random()
    if chance < 0.2:
        phrase = rng.choice(PARTICIPLES)
        return Relation(phrase, phrase, False)
    noun = invented_word(rng).lower() if chance < 0.35 else rng.choice(NOUNS)
    text = f"{rng.choice(DOMAINS)} {noun}" if rng.random() < 0.3 else noun
    return Relation(text, noun, True)


def _word_question(rng: random.Random, relation: Relation, entity: str, forward: bool) -> str:
    if relation.is_noun:
        wordings = FORWARD_NOUN if forward else INVERSE_NOUN
    else:
        wordings = FORWARD_PARTICIPLE if forward else INVERSE_PARTICIPLE
    return rng.choice(wordings).format(r=relation.question_text, x=entity)


def _different_relation(rng: random.Random, taken: Relation) -> Relation:
    while (other := draw_relation(rng)).question_text == taken.question_text:
        pass
    return other


Fact = tuple[str, Relation, str]


def _gold_facts(
    question_type: str, names: NameSource, rng: random.Random, num_facts: int
) -> tuple[str, list[Fact], list[str]]:
    """Draws a question's text, its gold facts and their markers."""
    entity, relation = names.draw(), draw_relation(rng)
    if question_type == "two_hop":
        middle, second = names.draw(), _different_relation(rng, relation)
        first: Fact = (entity, relation, middle)
        inner = (
            f"the {relation.question_text} of {entity}"
            if relation.is_noun
            else f"what {entity} is {relation.question_text}"
        )
        forward = rng.random() < 0.7
        last = (middle, second, names.draw()) if forward else (names.draw(), second, middle)
        # The first hop leads to the middle entity only, so just the second fact is an answer.
        return (
            _word_question(rng, second, inner, forward),
            [first, last],
            [IRRELEVANT, TAIL if forward else HEAD],
        )
    count = 1
    if question_type.endswith("_list"):
        count = min(rng.choices(LIST_LENGTHS, LENGTH_WEIGHTS)[0], num_facts)
    forward = question_type.startswith("forward")
    facts: list[Fact] = [
        (entity, relation, names.draw()) if forward else (names.draw(), relation, entity)
        for _ in range(count)
    ]
    return (
        _word_question(rng, relation, entity, forward),
        facts,
        [TAIL if forward else HEAD] * count,
    )


def _distractor(names: NameSource, rng: random.Random, gold: Sequence[Fact]) -> Fact:
    """Draws a fact that shares an entity, the relation or nothing with a gold fact."""
    head, relation, tail = rng.choice(gold)
    chance = rng.random()
    if chance < 0.3:
        return head, _different_relation(rng, relation), names.draw()
    if chance < 0.5:
        return names.draw(), relation, names.draw()
    if chance < 0.6:
        return names.draw(), _different_relation(rng, relation), tail
    if chance < 0.7:
        return names.draw(), _different_relation(rng, relation), head
    if chance < 0.75:
        return tail, _different_relation(rng, relation), names.draw()
    return names.draw(), draw_relation(rng), names.draw()


def _answers(facts: Sequence[tuple[str, str, str]], markers: Sequence[str]) -> tuple[str, ...]:
    ends = [
        fact[2] if marker == TAIL else fact[0]
        for fact, marker in zip(facts, markers, strict=True)
        if marker != IRRELEVANT
    ]
    return tuple(dict.fromkeys(ends))


def draw_sample(
    question_type: str, names: NameSource, rng: random.Random, num_facts: int
) -> Sample:
    """Draws a question of one type. No distractor answers it.

    Raises:
        ValueError: the type is unknown, or `num_facts` < 2.
    """
    if question_type not in QUESTION_TYPES or num_facts < 2:
        raise ValueError(
            f"question_type {question_type!r}, num_facts {num_facts}: expected one of "
            f"{QUESTION_TYPES} and at least 2 facts."
        )
    question, gold, markers = _gold_facts(question_type, names, rng, num_facts)
    taken = {(end, fact[1].question_text) for fact in gold for end in (fact[0], fact[2])}
    marked = list(zip(gold, markers, strict=True))
    while len(marked) < num_facts:
        fact = _distractor(names, rng, gold)
        # A second fact with the question's relation at one of its entities could be an answer too.
        if taken.isdisjoint((end, fact[1].question_text) for end in (fact[0], fact[2])):
            marked.append((fact, IRRELEVANT))
    rng.shuffle(marked)
    facts = tuple((head, relation.text, tail) for (head, relation, tail), _ in marked)
    shuffled = tuple(marker for _, marker in marked)
    return Sample(question, facts, shuffled, _answers(facts, shuffled))


def draw_drill(rng: random.Random, num_facts: int) -> Sample:
    """Draws unrelated short facts without a question. Only the markers tell the answers.

    Many facts are answers, so this is the cheapest way to learn lists.
    """
    facts = tuple(
        (invented_word(rng), rng.choice(NOUNS), invented_word(rng)) for _ in range(num_facts)
    )
    share = rng.uniform(0.2, 0.7)
    markers = [rng.choice((TAIL, HEAD)) if rng.random() < share else IRRELEVANT for _ in facts]
    # A row without answers would supervise the end token alone.
    if all(marker == IRRELEVANT for marker in markers):
        markers[rng.randrange(num_facts)] = rng.choice((TAIL, HEAD))
    return Sample("", facts, tuple(markers), _answers(facts, markers))


def without_clue(sample: Sample, names: NameSource, rng: random.Random) -> Sample:
    """Copies a sample with a question whose text says nothing about the facts."""
    if rng.random() < 0.5:
        question = _word_question(rng, draw_relation(rng), names.draw(), rng.random() < 0.5)
    else:
        words = [
            invented_word(rng).lower() if rng.random() < 0.5 else rng.choice(NOUNS)
            for _ in range(6)
        ]
        question = " ".join(words[: rng.randint(2, 6)])
    return replace(sample, question=question)


def noisy_markers(sample: Sample, rng: random.Random, marker_accuracy: float) -> tuple[str, ...]:
    """Keeps each marker with probability `marker_accuracy`, else draws a wrong one."""
    return tuple(
        marker
        if rng.random() < marker_accuracy
        else rng.choice([other for other in MARKERS if other != marker])
        for marker in sample.markers
    )
