"""Indexing a graph file into a mapped graph, and opening what is indexed.

The file is synthetic: it has the relations and degrees of a published graph, or of the demo's where
that is not found.
"""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from itertools import count
from pathlib import Path

import networkx
import pytest

from bench.data import graph_file, raw_questions
from bench.measure import Contender
from bench.results import Comparison
from bench.synthetic_graph import write_synthetic
from dragkit.data.build.graph import Graph
from dragkit.data.build.graph_store import open_graph

KB = "freebase_pool"
# Indexes a file in a process of its own, and prints its largest resident size in kB. The one that
# getrusage gives includes that of the process it came from.
_PEAK = """
import sys
from pathlib import Path
from dragkit.data.build.graph_store import open_graph
open_graph([sys.argv[1]], cache_dir=sys.argv[2])
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


def _dictionaries(path: Path) -> dict[str, set[tuple[str, str]]]:
    facts = defaultdict(set)
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            head, relation, tail = line.rstrip("\n").split("\t")
            facts[head].add((relation, tail))
    return facts


def _networkx(path: Path) -> networkx.MultiDiGraph:
    graph = networkx.MultiDiGraph()
    with path.open(encoding="utf-8", newline="\n") as file:
        rows = (line.rstrip("\n").split("\t") for line in file)
        graph.add_edges_from((head, tail, relation) for head, relation, tail in rows)
    return graph


@pytest.mark.parametrize("facts", [100_000, pytest.param(1_000_000, marks=pytest.mark.full)])
def test_indexing(facts: int, timed: Callable[..., None], cache_dir: Path, tmp_path: Path) -> None:
    """The peers read the file into memory, each time anew."""
    like, name = real_graph(cache_dir)
    path = tmp_path / "graph.tsv"
    write_synthetic(path, like, facts)
    numbers = count()

    def build(folder: Path) -> Graph:
        return open_graph([path], cache_dir=folder)

    graph = build(tmp_path / "indexed")
    in_memory = (_dictionaries(path), _networkx(path))
    sizes = {graph.num_facts, sum(map(len, in_memory[0].values())), in_memory[1].size()}
    if len(sizes) > 1 or in_memory[1].order() != graph.num_entities:
        raise ValueError(f"the contenders have different numbers of facts or entities: {sizes}")
    del in_memory
    contenders = [
        Contender("index", lambda: build(tmp_path / str(next(numbers))), peer=False),
        Contender("open what is indexed", lambda: build(tmp_path / "indexed"), peer=False),
        Contender("Python dictionaries", lambda: _dictionaries(path)),
        Contender("networkx", lambda: _networkx(path)),
    ]
    about = {
        "data": f"synthetic, like {name}",
        "lines": facts,
        "facts": graph.num_facts,
        "entities": graph.num_entities,
        "peak_mb": _peak_mb(path, tmp_path / "peak"),
    }
    timed(Comparison(f"graph, {facts} lines", about, []), contenders)


def _peak_mb(path: Path, folder: Path) -> int:
    command = [sys.executable, "-c", _PEAK, str(path), str(folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) // 1024


def real_graph(cache_dir: Path) -> tuple[Graph, str]:
    """A published graph and its name, or the facts of the demo's training questions."""
    path = graph_file(KB)
    if path is not None:
        return open_graph([path], cache_dir=cache_dir), KB
    from dragkit.demo import demo_files

    rows = raw_questions(Path(demo_files(cache_dir).train))
    return Graph.from_triples(tuple(fact) for row in rows for fact in row["triples"]), "the demo"
