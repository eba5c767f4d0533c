"""Helpers of the data tests: rows, files of rows, and a stand-in for cached question states."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dragkit.data.collate import PackedCollator
from dragkit.data.question_file import Question
from dragkit.data.store import PackedStore
from dragkit.data.tokens import TokenRows


class ZeroStates:
    """Question states that only remember how they were asked."""

    def rows(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """One state per question that holds its row."""
        states = torch.tensor([[[float(row)]] for row in rows])
        return states, torch.ones(len(rows), 1, dtype=torch.bool)


@pytest.fixture(scope="session")
def zero_states() -> ZeroStates:
    return ZeroStates()


@pytest.fixture(scope="session")
def collator(zero_states: ZeroStates) -> Callable[..., PackedCollator]:
    """A collator of a store whose relation texts are of one token, or as in `mask`."""

    def make(
        store: PackedStore, tokens: TokenRows | None = None, mask: Tensor | None = None
    ) -> PackedCollator:
        mask = torch.ones(store.num_relations, 2, 1, dtype=torch.bool) if mask is None else mask
        return PackedCollator(store, zero_states, mask, tokens)

    return make


@pytest.fixture
def tiny_file() -> Path:
    return Path(__file__).resolve().parents[1] / "fixtures" / "heuristics_tiny.jsonl"


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows (dicts, or bytes for lines that are not JSON) to a file."""

    def write(rows: Sequence[dict | bytes], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write


@pytest.fixture(scope="session")
def random_rows() -> Callable[..., list[dict]]:
    """Rows over a small random multigraph with self-loops, some empty, some without a topic."""

    def make(count: int, *, seed: int, max_facts: int = 30) -> list[dict]:
        draw = random.Random(seed)
        rows = []
        for number in range(count):
            size = draw.choice([0, 1, draw.randint(2, max_facts)])
            nodes = draw.randint(1, 12)
            names = [f"e{draw.randrange(40)}" for _ in range(nodes)]
            rows.append(
                {
                    "id": f"q{number}",
                    "question": f"question {number}",
                    "topic_entities": draw.sample(names, min(2, nodes))
                    if draw.random() < 0.8
                    else ["nowhere"],
                    "answer": draw.sample(names, min(2, nodes)),
                    "paths": [[draw.choice(names), draw.choice(names)]],
                    "triples": [
                        [draw.choice(names), f"dom.type.r{draw.randrange(6)}", draw.choice(names)]
                        for _ in range(size)
                    ],
                }
            )
        return rows

    return make


@pytest.fixture
def question() -> Callable[..., Question]:
    """A question of its fields."""

    def make(triples: Sequence[Sequence[str]], **fields: object) -> Question:
        known = {"id": "q", "text": "?", "topics": (), "paths": (), "answers": (), "line": 1}
        return Question(triples=tuple(map(tuple, triples)), **{**known, **fields})  # type: ignore[arg-type]

    return make


def _slow_classes(
    names: Sequence[str], topics: Sequence[str], triples: Sequence[tuple]
) -> list[int]:
    """Class of every node: partitions divided by sorted lists of neighbours until none changes."""
    colour = {name: int(name in topics) for name in names}
    while True:
        seen = {
            name: (
                colour[name],
                sorted((r, colour[h]) for h, r, t in triples if t == name),
                sorted((r, colour[t]) for h, r, t in triples if h == name),
            )
            for name in names
        }
        known: list[tuple] = []
        for name in names:
            if seen[name] not in known:
                known.append(seen[name])
        divided = {name: known.index(seen[name]) for name in names}
        if len(known) == len(set(colour.values())):
            return [divided[name] for name in names]
        colour = divided


@pytest.fixture(scope="session")
def slow_classes() -> Callable[..., list[int]]:
    """An independent way to the classes that `merge_nodes` finds."""
    return _slow_classes
