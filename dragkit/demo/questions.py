"""Questions over the demo knowledge base: what can be asked, a balanced draw of it, the wording."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from dragkit.demo.kb import Chain, Fact, KnowledgeBase, package_text, walked_facts

MAX_ANSWERS = 12
# A question of more gold facts would not fit in a subgraph with room for distractors.
MAX_GOLD_FACTS = 30
MAX_CHAIN_SHARE = 0.06

# Share of the questions by number of hops; "and" are conjunctions of two topics.
MIX = {"1": 0.45, "2": 0.35, "3": 0.12, "and": 0.08}

_SLOT = re.compile(r"\{(the |a |)([xy])\}")


@dataclass(frozen=True, slots=True)
class Template:
    """What is asked, as one relation chain per topic, and its wordings.

    Attributes:
        text: the chains as written in the table; steps joined by ' ', chains by ' & '.
        chains: steps of each chain; an answer is reached by all chains, each from its own topic.
        wordings: question texts with a slot for each topic.
    """

    text: str
    chains: tuple[Chain, ...]
    wordings: tuple[str, ...]

    @property
    def kind(self) -> str:
        """Key of the hop mix."""
        return "and" if len(self.chains) > 1 else str(len(self.chains[0]))


@dataclass(frozen=True, slots=True)
class Asked:
    """One thing that can be asked: a template and its topics, with the complete truth about it.

    Attributes:
        template: relation chains and wordings.
        topics: one entity per chain.
        answers: sorted; all that the knowledge base gives.
        paths: per chain, all gold paths as entities.
    """

    template: Template
    topics: tuple[str, ...]
    answers: tuple[str, ...]
    paths: tuple[tuple[tuple[str, ...], ...], ...]

    def gold_facts(self) -> list[Fact]:
        """The facts of all gold paths, sorted, each once."""
        walks = zip(self.paths, self.template.chains, strict=True)
        return sorted(
            {f for paths, chain in walks for path in paths for f in walked_facts(path, chain)}
        )


def parse_templates(text: str) -> list[Template]:
    """Templates of a table with the columns chain and question, one wording a row."""
    wordings: dict[str, list[str]] = {}
    for line in text.splitlines()[1:]:
        chain, wording = line.split("\t")
        wordings.setdefault(chain, []).append(wording)
    return [
        Template(chain, tuple(tuple(part.split(" ")) for part in chain.split(" & ")), tuple(texts))
        for chain, texts in wordings.items()
    ]


def enumerate_asked(kb: KnowledgeBase, template: Template) -> Iterator[Asked]:
    """Everything sensible the template can ask: 1 to 12 answers, none of them a topic.

    The chains of a conjunction must each leave more than the answers, or one topic would do.
    """
    reach = [
        {topic: kb.ends(topic, chain) for topic in sorted(kb.steps[chain[0]])}
        for chain in template.chains
    ]
    mirrored = len(reach) > 1 and template.chains[0] == template.chains[1]
    for topics in product(*reach):
        if mirrored and topics[0] >= topics[1]:
            continue
        ends = [tails[topic] for tails, topic in zip(reach, topics, strict=True)]
        answers = set.intersection(*ends)
        if not 1 <= len(answers) <= MAX_ANSWERS or answers & set(topics):
            continue
        if len(ends) > 1 and any(len(tails) == len(answers) for tails in ends):
            continue
        walks = zip(topics, template.chains, strict=True)
        paths = tuple(tuple(kb.paths(topic, chain, answers)) for topic, chain in walks)
        asked = Asked(template, topics, tuple(sorted(answers)), paths)
        if len(asked.gold_facts()) <= MAX_GOLD_FACTS:
            yield asked


def fill_level(available: Sequence[int], total: int) -> list[int]:
    """How many to take of each so that they sum to `total` and none is short of an equal share.

    Raises:
        ValueError: there are fewer than `total`.
    """
    if sum(available) < total:
        raise ValueError(f"{total} questions are wanted, but only {sum(available)} can be asked.")
    taken = [0] * len(available)
    left = total
    by_size = sorted(range(len(available)), key=lambda i: (available[i], i))
    for place, i in enumerate(by_size):
        taken[i] = min(available[i], left // (len(available) - place))
        left -= taken[i]
    return taken


def draw(
    kb: KnowledgeBase, templates: Sequence[Template], sizes: Sequence[int], rng: random.Random
) -> list[list[Asked]]:
    """Splits of the given sizes, balanced over kinds and chains; nothing is in two splits."""
    splits: list[list[Asked]] = [[] for _ in sizes]
    for kind, counts in zip(MIX, _counts_by_kind(sizes), strict=True):
        pools = [list(enumerate_asked(kb, t)) for t in templates if t.kind == kind]
        cap = int(MAX_CHAIN_SHARE * sum(sizes))
        spread: list[tuple[float, float, Asked]] = []
        wanted = fill_level([min(cap, len(pool)) for pool in pools], sum(counts))
        for pool, take in zip(pools, wanted, strict=True):
            for place, asked in enumerate(rng.sample(pool, take)):
                # Sorted by place in its chain, every stretch of the list holds all chains alike.
                spread.append(((place + rng.random()) / take, rng.random(), asked))
        spread.sort(key=lambda item: item[:2])
        start = 0
        for split, count in zip(splits, counts, strict=True):
            split.extend(asked for _, _, asked in spread[start : start + count])
            start += count
    for split in splits:
        rng.shuffle(split)
    return splits


def _counts_by_kind(sizes: Sequence[int]) -> list[list[int]]:
    """Per kind of the mix, the number of questions in each split."""
    counts = [[round(share * size) for size in sizes] for share in MIX.values()]
    for column, size in enumerate(sizes):
        counts[0][column] += size - sum(row[column] for row in counts)
    return counts


class Wording:
    """Puts topics into question texts, with the article where English wants one."""

    def __init__(self, kb: KnowledgeBase) -> None:
        self._takes_the: set[str] = set()
        for line in package_text("articles.tsv")["articles.tsv"].splitlines()[1:]:
            step, pattern = line.split("\t")
            ends = {name for names in kb.steps[step].values() for name in names}
            self._takes_the |= {name for name in ends if re.fullmatch(pattern, name)}

    def write(self, asked: Asked, rng: random.Random) -> str:
        """One wording of the question, drawn at random."""
        names = dict(zip("xy", asked.topics, strict=False))

        def put(slot: re.Match[str]) -> str:
            article, name = slot[1], names[slot[2]]
            if article == "the ":
                return f"the {name}" if name in self._takes_the else name
            if article == "a ":
                return f"an {name}" if name[0] in "aeiou" else f"a {name}"
            return name

        text = _SLOT.sub(put, rng.choice(asked.template.wordings))
        return text[0].upper() + text[1:]
