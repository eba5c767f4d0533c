"""Packing a heuristics file, once per data set, opening the packed store, and reading graphs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from bench.data import LARGE, SMALL, BenchFile, question_file, raw_questions
from bench.earlier_contenders import string_graph
from bench.measure import Contender
from bench.results import Comparison
from bench.synthetic_questions import write_questions
from dragkit.data.file_packing import pack_file
from dragkit.data.store import PackedStore

_SYNTHETIC = "synthetic, 4,250 facts"
_FILES = (SMALL, *(pytest.param(name, marks=pytest.mark.full) for name in (LARGE, _SYNTHETIC)))


@pytest.fixture
def bench_file(request: pytest.FixtureRequest, cache_dir: Path, tmp_path: Path) -> BenchFile:
    """The set of the parameter. The synthetic one is large enough for several processes."""
    if request.param != _SYNTHETIC:
        return question_file(request.param, cache_dir)
    path = tmp_path / "synthetic.jsonl"
    write_questions(question_file(LARGE, cache_dir).path, path, questions=600, facts=4250)
    return BenchFile(path, _SYNTHETIC)


@pytest.mark.parametrize("bench_file", _FILES, indirect=True)
def test_packing(bench_file: BenchFile, timed: Callable[..., None], tmp_path: Path) -> None:
    """Questions per second. Packing reads, checks, labels, sorts and writes."""
    numbers = count()

    def build(processes: int | None) -> None:
        folder = tmp_path / str(next(numbers)) / "content"
        folder.mkdir(parents=True)
        pack_file(
            bench_file.path,
            folder,
            label_rule="auto",
            max_bad_fraction=0.0,
            merge=True,
            processes=processes,
        )

    def open_store() -> PackedStore:
        return PackedStore.build_or_open(bench_file.path, cache_dir=tmp_path / "packed")

    store = open_store()
    contenders = [
        Contender("pack, one process", lambda: build(1), peer=False),
        Contender("pack, a process for each core", lambda: build(None), peer=False),
        Contender("open what is packed", open_store, peer=False),
        Contender("read the JSON alone", lambda: raw_questions(bench_file.path)),
    ]
    about = {"data": bench_file.name, "questions": len(store)}
    about |= {"facts": int(store.fact_counts.sum())}
    timed(Comparison(f"store, {bench_file.name}", about, [], questions=len(store)), contenders)


@pytest.mark.parametrize("bench_file", _FILES, indirect=True)
def test_reading(bench_file: BenchFile, timed: Callable[..., None], tmp_path: Path) -> None:
    """Questions per second: sorted arrays from the store, against dictionaries at every access."""
    store = PackedStore.build_or_open(bench_file.path, cache_dir=tmp_path / "packed")
    raw = raw_questions(bench_file.path)[:64]

    def read() -> list[tuple]:
        blocks = ("facts", "merged_facts", "merged_pairs")
        return [
            (
                *(store.block(name, row).copy() for name in blocks),
                store.labels[store.fact_ptr[row] : store.fact_ptr[row + 1]].copy(),
            )
            for row in range(len(raw))
        ]

    contenders = [
        Contender("arrays of the store", read, peer=False, calls=None),
        Contender("the earlier graph of strings", lambda: [string_graph(q, 1) for q in raw]),
    ]
    about = {"data": bench_file.name, "questions": len(raw)}
    about |= {"facts": int(store.fact_counts[: len(raw)].sum())}
    timed(Comparison(f"graphs, {bench_file.name}", about, [], questions=len(raw)), contenders)
