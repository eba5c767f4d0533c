"""Invented questions about invented facts, with markers that say what each fact is good for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dragkit.tiny.names import NameSource, word
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
KINDS = ("forward", "inverse", "forward_list", "inverse_list", "two_hop")

LIST_LENGTHS, LENGTH_WEIGHTS = (2, 3, 4, 5, 6), (40, 28, 16, 10, 6)


@dataclass(frozen=True, slots=True)
class Relation:
    """`text` stands in facts, `asked` in questions; participles have their own wordings."""

    text: str
    asked: str
    is_noun: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """One question.

    Attributes:
        question: its text.
        facts: (head, relation text, tail), in prompt order.
        markers: the right marker of each fact.
        answers: what the facts marked head or tail answer, in prompt order, without repeats.
    """

    question: str
    facts: tuple[tuple[str, str, str], ...]
    markers: tuple[str, ...]
    answers: tuple[str, ...]


def draw_relation(rng: random.Random) -> Relation:
    """A listed relation, sometimes after a domain word, sometimes an invented one."""
    chance = rng.random()
    if chance < 0.2:
        phrase = rng.choice(PARTICIPLES)
        return Relation(phrase, phrase, False)
    noun = word(rng).lower() if chance < 0.35 else rng.choice(NOUNS)
    text = f"{rng.choice(DOMAINS)} {noun}" if rng.random() < 0.3 else noun
    return Relation(text, noun, True)


def _ask(rng: random.Random, relation: Relation, entity: str, forward: bool) -> str:
    if relation.is_noun:
        wordings = FORWARD_NOUN if forward else INVERSE_NOUN
    else:
        wordings = FORWARD_PARTICIPLE if forward else INVERSE_PARTICIPLE
    return rng.choice(wordings).format(r=relation.asked, x=entity)


def _different_relation(rng: random.Random, taken: Relation) -> Relation:
    while (other := draw_relation(rng)).asked == taken.asked:
        pass
    return other


Fact = tuple[str, Relation, str]


def _core(
    kind: str, names: NameSource, rng: random.Random, num_facts: int
) -> tuple[str, list[Fact], list[str]]:
    """The question, the facts it is about and their markers."""
    entity, relation = names.draw(), draw_relation(rng)
    if kind == "two_hop":
        middle, second = names.draw(), _different_relation(rng, relation)
        first: Fact = (entity, relation, middle)
        inner = (
            f"the {relation.asked} of {entity}"
            if relation.is_noun
            else f"what {entity} is {relation.asked}"
        )
        forward = rng.random() < 0.7
        last = (middle, second, names.draw()) if forward else (names.draw(), second, middle)
        return (
            _ask(rng, second, inner, forward),
            [first, last],
            [IRRELEVANT, TAIL if forward else HEAD],
        )
    count = 1
    if kind.endswith("_list"):
        count = min(rng.choices(LIST_LENGTHS, LENGTH_WEIGHTS)[0], num_facts)
    forward = kind.startswith("forward")
    facts: list[Fact] = [
        (entity, relation, names.draw()) if forward else (names.draw(), relation, entity)
        for _ in range(count)
    ]
    return _ask(rng, relation, entity, forward), facts, [TAIL if forward else HEAD] * count


def _distractor(names: NameSource, rng: random.Random, core: Sequence[Fact]) -> Fact:
    """A fact that shares an entity or the relation with the core, or nothing."""
    head, relation, tail = rng.choice(core)
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


def draw_sample(kind: str, names: NameSource, rng: random.Random, num_facts: int) -> Sample:
    """One question of `kind` among `num_facts` facts, of which no distractor is an answer too.

    Raises:
        ValueError: if the kind is unknown or `num_facts` < 2.
    """
    if kind not in KINDS or num_facts < 2:
        raise ValueError(
            f"kind {kind!r} with {num_facts} facts; expected one of {KINDS}, >= 2 facts"
        )
    question, core, markers = _core(kind, names, rng, num_facts)
    asked = {(fact[0], fact[1].asked) for fact in core} | {
        (fact[2], fact[1].asked) for fact in core
    }
    marked = list(zip(core, markers, strict=True))
    while len(marked) < num_facts:
        fact = _distractor(names, rng, core)
        if (fact[0], fact[1].asked) not in asked and (fact[2], fact[1].asked) not in asked:
            marked.append((fact, IRRELEVANT))
    rng.shuffle(marked)
    facts = tuple((head, relation.text, tail) for (head, relation, tail), _ in marked)
    shuffled = tuple(marker for _, marker in marked)
    return Sample(question, facts, shuffled, _answers(facts, shuffled))


def draw_drill(rng: random.Random, num_facts: int) -> Sample:
    """Unrelated short facts of which any number holds an answer, head or tail, and no question.

    Only the markers tell, and the answers are many: the cheapest way to learn lists.
    """
    facts = tuple((word(rng), rng.choice(NOUNS), word(rng)) for _ in range(num_facts))
    share = rng.uniform(0.2, 0.7)
    markers = [rng.choice((TAIL, HEAD)) if rng.random() < share else IRRELEVANT for _ in facts]
    if all(marker == IRRELEVANT for marker in markers):
        markers[rng.randrange(num_facts)] = rng.choice((TAIL, HEAD))
    return Sample("", facts, tuple(markers), _answers(facts, markers))


def without_clue(sample: Sample, names: NameSource, rng: random.Random) -> Sample:
    """The same facts and answers, with a question whose text says nothing about them."""
    if rng.random() < 0.5:
        question = _ask(rng, draw_relation(rng), names.draw(), rng.random() < 0.5)
    else:
        words = [word(rng).lower() if rng.random() < 0.5 else rng.choice(NOUNS) for _ in range(6)]
        question = " ".join(words[: rng.randint(2, 6)])
    return replace(sample, question=question)


def noisy_markers(sample: Sample, rng: random.Random, right: float) -> tuple[str, ...]:
    """The sample's markers, each kept with probability `right`, else replaced by another one."""
    return tuple(
        marker
        if rng.random() < right
        else rng.choice([other for other in MARKERS if other != marker])
        for marker in sample.markers
    )
