"""Packing a heuristics file, once per data set, and opening the packed store."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from bench.data import LARGE, SMALL, question_file, raw_questions
from bench.measure import Contender
from bench.results import Comparison
from dragkit.data.store import PackedStore


@pytest.mark.parametrize("name", [SMALL, pytest.param(LARGE, marks=pytest.mark.full)])
def test_packing(name: str, timed: Callable[..., None], cache_dir: Path, tmp_path: Path) -> None:
    """Questions per second. Packing reads, checks, labels, sorts and writes."""
    file = question_file(name, cache_dir)
    folder_numbers = count()

    def build(folder: Path) -> PackedStore:
        return PackedStore.build_or_open(
            file.path, cache_dir=folder, label_rule="auto", max_bad_fraction=0.0
        )

    store = build(tmp_path / "packed")
    contenders = [
        Contender("pack", lambda: build(tmp_path / str(next(folder_numbers))), peer=False),
        Contender("open what is packed", lambda: build(tmp_path / "packed"), peer=False),
        Contender("read the JSON alone", lambda: raw_questions(file.path)),
    ]
    about = {"data": file.name, "questions": len(store), "facts": int(store.fact_counts.sum())}
    timed(Comparison(f"store, {file.name}", about, [], questions=len(store)), contenders)
