"""Fixtures of the data tests: rows, files of rows, and a stand-in for cached question states."""

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
    """Question states that hold the row that was asked for."""

    def rows(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns one state per question, its row."""
        states = torch.tensor([[[float(row)]] for row in rows])
        return states, torch.ones(len(rows), 1, dtype=torch.bool)


@pytest.fixture(scope="session")
def zero_states() -> ZeroStates:
    return ZeroStates()


@pytest.fixture(scope="session")
def collator(zero_states: ZeroStates) -> Callable[..., PackedCollator]:
    """Makes a collator of a store. Relation texts have one token, or those of `ptr`."""

    def make(
        store: PackedStore, tokens: TokenRows | None = None, ptr: Tensor | None = None
    ) -> PackedCollator:
        ptr = torch.arange(2 * store.num_relations + 1) if ptr is None else ptr
        return PackedCollator(store, zero_states, ptr, tokens)

    return make


@pytest.fixture
def tiny_file() -> Path:
    return Path(__file__).resolve().parents[1] / "fixtures" / "heuristics_tiny.jsonl"


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows to a file: dicts as JSON, bytes as they are."""

    def write(rows: Sequence[dict | bytes], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write


@pytest.fixture(scope="session")
def random_rows() -> Callable[..., list[dict]]:
    """Makes rows of small random multigraphs with self-loops. Some lack facts or a topic."""

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
    """Makes a question of triples and other fields."""

    def make(triples: Sequence[Sequence[str]], **fields: object) -> Question:
        known = {"id": "q", "text": "?", "topics": (), "paths": (), "answers": (), "line": 1}
        return Question(triples=tuple(map(tuple, triples)), **{**known, **fields})  # type: ignore[arg-type]

    return make


def _slow_merged_nodes(
    names: Sequence[str], topics: Sequence[str], triples: Sequence[tuple]
) -> list[int]:
    """Refines colours by sorted lists of neighbours until their number stays the same."""
    colour = {name: int(name in topics) for name in names}
    while True:
        signature = {
            name: (
                colour[name],
                sorted((r, colour[h]) for h, r, t in triples if t == name),
                sorted((r, colour[t]) for h, r, t in triples if h == name),
            )
            for name in names
        }
        distinct = list(dict.fromkeys(map(repr, signature.values())))
        refined = {name: distinct.index(repr(signature[name])) for name in names}
        if len(distinct) == len(set(colour.values())):
            return list(refined.values())
        colour = refined


@pytest.fixture(scope="session")
def slow_merged_nodes() -> Callable[..., list[int]]:
    """An independent definition of the partition that `merge_nodes` computes."""
    return _slow_merged_nodes
