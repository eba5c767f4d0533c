"""The demo knowledge base: tables of facts about the world, and relation chains run over it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files

INVERSE = "^-1"

Fact = tuple[str, str, str]
Chain = tuple[str, ...]


def package_text(name: str) -> dict[str, str]:
    """Text by file name of the data file `name`, or of all tables in the folder `name`."""
    place = files("dragkit.demo").joinpath(name)
    found = sorted(place.iterdir(), key=lambda p: p.name) if place.is_dir() else [place]
    return {p.name: p.read_text(encoding="utf-8") for p in found if p.name.endswith(".tsv")}


def table_facts(text: str) -> Iterator[Fact]:
    """Facts of one table: a row per subject, a column per relation, objects joined by '; '."""
    header, *rows = (line.split("\t") for line in text.splitlines())
    for subject, *cells in rows:
        for relation, cell in zip(header[1:], cells, strict=True):
            for name in filter(None, cell.split("; ")):
                yield subject, relation, name


@dataclass(frozen=True, slots=True)
class KnowledgeBase:
    """Facts in sorted order, and the neighbours of an entity along a step.

    A step is a relation, or a relation with `^-1` at its end: walked from object to subject.

    Attributes:
        facts: distinct (subject, relation, object), sorted.
        entities: names, sorted.
        steps: for each step, the sorted ends reached from each start.
    """

    facts: tuple[Fact, ...]
    entities: tuple[str, ...]
    steps: dict[str, dict[str, tuple[str, ...]]]

    def ends(self, start: str, chain: Chain) -> set[str]:
        """All entities reached from `start` by walking the chain; empty where it leads nowhere."""
        reached = {start}
        for step in chain:
            along = self.steps[step]
            reached = {end for name in reached for end in along.get(name, ())}
        return reached

    def paths(self, start: str, chain: Chain, answers: set[str]) -> list[tuple[str, ...]]:
        """Every way from `start` along the chain to one of the answers, as entities, sorted."""
        partial: list[tuple[str, ...]] = [(start,)]
        for step in chain:
            along = self.steps[step]
            partial = [(*path, end) for path in partial for end in along.get(path[-1], ())]
        return sorted(path for path in partial if path[-1] in answers)


def walked_facts(path: tuple[str, ...], chain: Chain) -> list[Fact]:
    """The facts a path walks over, in order, each in its own direction."""
    return [
        (end, step.removesuffix(INVERSE), start) if step.endswith(INVERSE) else (start, step, end)
        for start, step, end in zip(path, chain, path[1:], strict=False)
    ]


def knowledge_base(facts: Iterable[Fact]) -> KnowledgeBase:
    """Index the facts; repeated ones count once."""
    distinct = tuple(sorted(set(facts)))
    steps: dict[str, dict[str, list[str]]] = {}
    for head, relation, tail in distinct:
        steps.setdefault(relation, {}).setdefault(head, []).append(tail)
        steps.setdefault(relation + INVERSE, {}).setdefault(tail, []).append(head)
    return KnowledgeBase(
        facts=distinct,
        entities=tuple(sorted({name for head, _, tail in distinct for name in (head, tail)})),
        steps={
            step: {start: tuple(sorted(ends)) for start, ends in along.items()}
            for step, along in steps.items()
        },
    )


def load_knowledge_base() -> KnowledgeBase:
    """The bundled tables as one knowledge base."""
    tables = package_text("tables").values()
    return knowledge_base(fact for text in tables for fact in table_facts(text))
