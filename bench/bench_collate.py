"""Collation of a packed store, against sorting from scratch and PyG's collation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest

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


def _sorted_from_scratch(graph: PackedGraph) -> FactIndex:
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
def test_collation(name: str, batch: int, timed: Callable[..., None], cache_dir: Path) -> None:
    """Questions per second. The concatenated orders equal those sorted from scratch."""
    file = question_file(name, cache_dir)
    source = question_source(file, bench_config(1), cache_dir, None, batch)
    batches = whole_batches(source, batch, 8)
    first = source.collator(batches[0])
    from_scratch = _sorted_from_scratch(first.graph)
    for field, ours, expected in zip(
        FactIndex._fields, first.graph.fact_index, from_scratch, strict=True
    ):
        check_agreement(f"fact_index.{field}", ours, expected, 0.0)
    questions = pyg_questions(source, sorted({row for rows in batches for row in rows}))
    rows, graphs = cycle(batches), cycle([source.collator(part).graph for part in batches])
    lists = cycle([[questions[row] for row in part] for part in batches])
    contenders = [
        Contender("PackedCollator", lambda: source.collator(next(rows)), peer=False, calls=10),
        Contender(
            "its three orders sorted anew", lambda: _sorted_from_scratch(next(graphs)), calls=10
        ),
        Contender("PyG Batch.from_data_list, no orders", lambda: pyg_batch(next(lists)), calls=10),
    ]
    about = {"data": file.name} | sizes(first)
    timed(Comparison(f"collate, {file.name}", about, [], questions=batch), contenders)
