"""The demo knowledge base: facts about the world, and walks over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files

INVERSE = "^-1"

Fact = tuple[str, str, str]
Chain = tuple[str, ...]


def package_text(name: str) -> dict[str, str]:
    """Text by file name of the data file `name`, or of all tables in the folder `name`."""
    path = files("dragkit.demo").joinpath(name)
    paths = sorted(path.iterdir(), key=lambda p: p.name) if path.is_dir() else [path]
    return {p.name: p.read_text(encoding="utf-8") for p in paths if p.name.endswith(".tsv")}


def table_facts(text: str) -> Iterator[Fact]:
    """Yields the facts of a table with a row per subject and a column per relation.

    A cell holds the objects, joined by a semicolon and a space.
    """
    header, *rows = (line.split("\t") for line in text.splitlines())
    for subject, *cells in rows:
        for relation, cell in zip(header[1:], cells, strict=True):
            for name in filter(None, cell.split("; ")):
                yield subject, relation, name


@dataclass(frozen=True, slots=True)
class KnowledgeBase:
    """Facts and the neighbours of each entity.

    A step is a relation, or its inverse, which ends in `^-1` and leads from object to subject.

    Attributes:
        facts: distinct (subject, relation, object), sorted.
        entities: names, sorted.
        steps: end entities by step and start entity, sorted.
    """

    facts: tuple[Fact, ...]
    entities: tuple[str, ...]
    steps: dict[str, dict[str, tuple[str, ...]]]

    def reachable(self, start: str, chain: Chain) -> set[str]:
        """All entities at the end of the chain from `start`."""
        reached = {start}
        for step in chain:
            ends_by_start = self.steps[step]
            reached = {end for name in reached for end in ends_by_start.get(name, ())}
        return reached

    def paths(self, start: str, chain: Chain, answers: set[str]) -> list[tuple[str, ...]]:
        """Every path from `start` along the chain to an answer, as entity names, sorted."""
        partial: list[tuple[str, ...]] = [(start,)]
        for step in chain:
            ends_by_start = self.steps[step]
            partial = [(*path, end) for path in partial for end in ends_by_start.get(path[-1], ())]
        return sorted(path for path in partial if path[-1] in answers)


def facts_on_path(path: tuple[str, ...], chain: Chain) -> list[Fact]:
    """The facts of a path in order, each as (subject, relation, object)."""
    return [
        (end, step.removesuffix(INVERSE), start) if step.endswith(INVERSE) else (start, step, end)
        for start, step, end in zip(path, chain, path[1:], strict=False)
    ]


def knowledge_base(facts: Iterable[Fact]) -> KnowledgeBase:
    """Indexes the distinct facts by step."""
    distinct = tuple(sorted(set(facts)))
    steps: dict[str, dict[str, list[str]]] = {}
    for head, relation, tail in distinct:
        steps.setdefault(relation, {}).setdefault(head, []).append(tail)
        steps.setdefault(relation + INVERSE, {}).setdefault(tail, []).append(head)
    return KnowledgeBase(
        facts=distinct,
        entities=tuple(sorted({name for head, _, tail in distinct for name in (head, tail)})),
        steps={
            step: {start: tuple(sorted(ends)) for start, ends in ends_by_start.items()}
            for step, ends_by_start in steps.items()
        },
    )


def load_knowledge_base() -> KnowledgeBase:
    """Reads the bundled tables."""
    tables = package_text("tables").values()
    return knowledge_base(fact for text in tables for fact in table_facts(text))
