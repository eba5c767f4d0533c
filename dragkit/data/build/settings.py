"""The settings of a build, and the parts that they make. This module is light."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

DEFAULT_SPLITS = {"train": 0.8, "dev": 0.1, "test": 0.1}


@dataclass(frozen=True)
class BuildSettings:
    """What to build. The flags of `python -m dragkit.data build` have the same names.

    Attributes:
        questions: a file or a folder of questions, or `hf:NAME`.
        output: the folder of the files of questions.
        layout, question_columns, answer_separator, limit_triples, entity_ids: how the questions
            are read, see `open_source_questions`.
        graph, graph_columns, separator, memory_limit: the knowledge graph, see `open_graph`.
        aliases: other names of the entities, see `read_aliases`.
        method, max_facts, hops, restart, tolerance: how subgraphs are cut, see `CutOptions`. None
            is its default. The facts that questions bring are cut only if one of these is given.
        exclude_relation: names of relations that no subgraph holds.
        exclude_relations: file with one such name on each line.
        splits: share of the questions by file, where the source names no split.
        split_seed: seed of these splits.
        workers: number of processes. None takes one for each core.
        shard: which shard, from 0, and of how many.
    """

    questions: str
    output: Path
    layout: str | None = None
    question_columns: dict[str, str] | None = None
    answer_separator: str = "|"
    limit_triples: int | None = None
    entity_ids: bool = False
    graph: tuple[Path, ...] = ()
    graph_columns: tuple[str, ...] | None = None
    separator: str | None = None
    memory_limit: str = "1GB"
    aliases: Path | None = None
    method: Literal["pagerank", "hops"] | None = None
    max_facts: int | None = None
    hops: int | None = None
    restart: float | None = None
    tolerance: float | None = None
    exclude_relation: tuple[str, ...] = ()
    exclude_relations: Path | None = None
    splits: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_SPLITS))
    split_seed: int = 0
    workers: int | None = None
    shard: tuple[int, int] = (0, 1)

    @property
    def cut(self) -> dict[str, object]:
        """The given options of the cut."""
        names = ("method", "max_facts", "hops", "restart", "tolerance")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def num_workers(self) -> int:
        """Number of processes."""
        return self.workers or len(os.sched_getaffinity(0))

    def record(self) -> dict[str, object]:
        """The settings on which the lines depend, as JSON, without the inputs' places."""
        places = ("questions", "output", "graph", "aliases", "exclude_relations")
        left_out = (*places, "memory_limit", "workers", "shard")
        return {name: value for name, value in asdict(self).items() if name not in left_out}
