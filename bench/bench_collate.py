"""Batches from a packed store: questions per second, against sorting anew and PyG's collation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch

from bench.data import (
    LARGE,
    SMALL,
    bench_config,
    pyg_questions,
    question_file,
    question_source,
    sizes,
    whole_batches,
)
from bench.measure import Contender, check_agreement
from bench.pyg_rearev import pyg_batch
from bench.results import Comparison
from dragkit.data.packed import PackedGraph
from dragkit_kernels import FactIndex, build_fact_index


def _sorted_anew(graph: PackedGraph) -> FactIndex:
    fact_index = graph.fact_index
    pair = fact_index.fact_pair.long()
    return build_fact_index(
        fact_index.head,
        fact_index.tail,
        fact_index.pair_relation[pair],
        graph.num_nodes,
        fact_index.pair_graph[pair],
        head_count=fact_index.head_count,
        tail_count=fact_index.tail_count,
    )


@pytest.mark.parametrize(
    "name,batch", [(SMALL, 16), pytest.param(LARGE, 16, marks=pytest.mark.full)]
)
def test_collation(
    name: str, batch: int, timed: Callable[..., Comparison], cache_dir: Path
) -> None:
    """The concatenated orders equal the ones sorted from scratch, in a fraction of the time."""
    file = question_file(name, cache_dir)
    source = question_source(file, bench_config(1), cache_dir, None, batch)
    batches = whole_batches(source, batch, 8)
    first = source.collator(batches[0])
    for field, kept, anew in zip(
        FactIndex._fields, first.graph.fact_index, _sorted_anew(first.graph), strict=True
    ):
        check_agreement(f"fact_index.{field}", kept.to(torch.float64), anew.to(torch.float64), 0.0)
    questions = pyg_questions(source, sorted({row for rows in batches for row in rows}))
    rows, graphs = cycle(batches), cycle([source.collator(r).graph for r in batches])
    lists = cycle([[questions[row] for row in r] for r in batches])
    contenders = [
        Contender("PackedCollator", lambda: source.collator(next(rows)), peer=False, calls=10),
        Contender("its three orders sorted anew", lambda: _sorted_anew(next(graphs)), calls=10),
        Contender("PyG Batch.from_data_list, no orders", lambda: pyg_batch(next(lists)), calls=10),
    ]
    about = {"data": file.name} | sizes(first)
    timed(Comparison(f"collate, {file.name}", about, [], questions=batch), contenders)
