"""Questions over the demo knowledge base: enumeration, a balanced draw, and wording."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from dragkit.demo.kb import Chain, Fact, KnowledgeBase, facts_on_path, package_text

MAX_ANSWERS = 12
# More gold facts would leave too few of the subgraph's 50 facts for distractors.
MAX_GOLD_FACTS = 30
MAX_CHAIN_FRACTION = 0.06

# Fraction of the questions by number of hops. "and" stands for conjunctions of two topics.
HOP_MIX = {"1": 0.45, "2": 0.35, "3": 0.12, "and": 0.08}

_SLOT = re.compile(r"\{(the |a |)([xy])\}")


@dataclass(frozen=True, slots=True)
class Template:
    """Relation chains, one per topic, and the wordings of their question.

    Attributes:
        text: the chains as the table writes them: steps joined by ' ', chains by ' & '.
        chains: steps of each chain. An answer is at the end of all chains.
        wordings: question texts with a slot for each topic.
    """

    text: str
    chains: tuple[Chain, ...]
    wordings: tuple[str, ...]

    @property
    def mix_key(self) -> str:
        """Key in `HOP_MIX`."""
        return "and" if len(self.chains) > 1 else str(len(self.chains[0]))


@dataclass(frozen=True, slots=True)
class DemoQuestion:
    """A template with its topics, and the complete answers of the knowledge base.

    Attributes:
        template: relation chains and wordings.
        topics: one entity per chain.
        answers: all answers, sorted.
        paths: per chain, all gold paths as entity names.
    """

    template: Template
    topics: tuple[str, ...]
    answers: tuple[str, ...]
    paths: tuple[tuple[tuple[str, ...], ...], ...]

    def gold_facts(self) -> list[Fact]:
        """The distinct facts of all gold paths, sorted."""
        walks = zip(self.paths, self.template.chains, strict=True)
        return sorted(
            {f for paths, chain in walks for path in paths for f in facts_on_path(path, chain)}
        )


def parse_templates(text: str) -> list[Template]:
    """Reads templates from a table with the columns chain and question, one wording per row."""
    wordings: dict[str, list[str]] = {}
    for line in text.splitlines()[1:]:
        chain, wording = line.split("\t")
        wordings.setdefault(chain, []).append(wording)
    return [
        Template(chain, tuple(tuple(part.split(" ")) for part in chain.split(" & ")), tuple(texts))
        for chain, texts in wordings.items()
    ]


def enumerate_questions(kb: KnowledgeBase, template: Template) -> Iterator[DemoQuestion]:
    """Yields all questions of a template with 1 to 12 answers, none of which is a topic.

    Each chain of a conjunction alone reaches more entities than the answers, so both topics matter.
    """
    reach = [
        {topic: kb.reachable(topic, chain) for topic in sorted(kb.steps[chain[0]])}
        for chain in template.chains
    ]
    mirrored = len(reach) > 1 and template.chains[0] == template.chains[1]
    for topics in product(*reach):
        # With equal chains (a, b) and (b, a) are one question, and (a, a) has one topic only.
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
        question = DemoQuestion(template, topics, tuple(sorted(answers)), paths)
        if len(question.gold_facts()) <= MAX_GOLD_FACTS:
            yield question


def balanced_counts(available: Sequence[int], total: int) -> list[int]:
    """Splits `total` among pools as evenly as their sizes allow.

    Raises:
        ValueError: the pools hold fewer than `total`.
    """
    if sum(available) < total:
        raise ValueError(f"{total} questions are wanted, but there are only {sum(available)}.")
    taken = [0] * len(available)
    left = total
    # Small pools first: what they cannot give is shared by the larger ones.
    by_size = sorted(range(len(available)), key=lambda i: (available[i], i))
    for place, i in enumerate(by_size):
        taken[i] = min(available[i], left // (len(available) - place))
        left -= taken[i]
    return taken


def draw(
    kb: KnowledgeBase, templates: Sequence[Template], sizes: Sequence[int], rng: random.Random
) -> list[list[DemoQuestion]]:
    """Draws disjoint splits of the given sizes, balanced over numbers of hops and chains."""
    splits: list[list[DemoQuestion]] = [[] for _ in sizes]
    cap = int(MAX_CHAIN_FRACTION * sum(sizes))
    for mix_key, counts in zip(HOP_MIX, _counts_by_mix_key(sizes), strict=True):
        pools = [list(enumerate_questions(kb, t)) for t in templates if t.mix_key == mix_key]
        spread: list[tuple[float, float, DemoQuestion]] = []
        drawn = balanced_counts([min(cap, len(pool)) for pool in pools], sum(counts))
        for pool, num_drawn in zip(pools, drawn, strict=True):
            for i, question in enumerate(rng.sample(pool, num_drawn)):
                # Sorted by relative position in its chain's draw, every slice of the list holds all
                # chains in equal proportion.
                spread.append(((i + rng.random()) / num_drawn, rng.random(), question))
        spread.sort(key=lambda item: item[:2])
        start = 0
        for split, count in zip(splits, counts, strict=True):
            split.extend(question for _, _, question in spread[start : start + count])
            start += count
    for split in splits:
        rng.shuffle(split)
    return splits


def _counts_by_mix_key(sizes: Sequence[int]) -> list[list[int]]:
    """Number of questions of each split, by key of `HOP_MIX`."""
    # Rounding may miss the size of a split, so one-hop questions take the rest.
    counts = [[round(share * size) for size in sizes] for share in HOP_MIX.values()]
    for column, size in enumerate(sizes):
        counts[0][column] += size - sum(row[column] for row in counts)
    return counts


class Wording:
    """Writes question texts, with the articles that English needs."""

    def __init__(self, kb: KnowledgeBase) -> None:
        self._takes_the: set[str] = set()
        for line in package_text("articles.tsv")["articles.tsv"].splitlines()[1:]:
            step, pattern = line.split("\t")
            ends = {name for names in kb.steps[step].values() for name in names}
            self._takes_the |= {name for name in ends if re.fullmatch(pattern, name)}

    def write(self, question: DemoQuestion, rng: random.Random) -> str:
        """Draws one wording of the question."""
        names = dict(zip("xy", question.topics, strict=False))

        def put(slot: re.Match[str]) -> str:
            article, name = slot[1], names[slot[2]]
            if article == "the ":
                return f"the {name}" if name in self._takes_the else name
            if article == "a ":
                return f"an {name}" if name[0] in "aeiou" else f"a {name}"
            return name

        text = _SLOT.sub(put, rng.choice(question.template.wordings))
        return text[0].upper() + text[1:]
