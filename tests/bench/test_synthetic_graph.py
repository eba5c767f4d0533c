"""The synthetic graph has the relations and the degrees of the graph that it is like."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

from bench.synthetic_graph import _SHARED_DEGREE, write_synthetic
from dragkit.data.build.graph import Graph


def _rows(path: Path) -> list[tuple[str, ...]]:
    return [tuple(line.split("\t")) for line in path.read_text(encoding="utf-8").splitlines()]


def test_whole_copies_keep_relations_and_degrees(tmp_path: Path) -> None:
    draw = random.Random(0)
    hub = [("hub", f"r{row % 3}", f"e{row}") for row in range(_SHARED_DEGREE + 1)]
    rest = [(f"e{draw.randrange(500)}", f"r{draw.randrange(9)}", "x y") for _ in range(300)]
    like = Graph.from_triples([*hub, *rest])
    path = tmp_path / "graph.tsv"
    write_synthetic(path, like, 4 * like.num_facts)
    rows, facts = _rows(path), like.triples(range(like.num_facts))
    relations = Counter(relation for _, relation, _ in facts)
    assert Counter(relation for _, relation, _ in rows) == {r: 4 * n for r, n in relations.items()}
    heads = Counter(head for head, _, _ in facts)
    copies = Counter(head for head, _, _ in rows)
    assert copies["hub"] == 4 * heads["hub"]
    assert {f"{head} {copy}": n for head, n in heads.items() for copy in range(4)}.items() - {
        (f"hub {copy}", heads["hub"]) for copy in range(4)
    } == {item for item in copies.items() if item[0] != "hub"}
    # Tails lie in all copies, so the copies hang together.
    assert len({(h.split()[-1], t.split()[-1]) for h, _, t in rows if h != "hub"}) == 16


def test_a_part_of_a_copy_is_a_random_part(tmp_path: Path) -> None:
    like = Graph.from_triples([(f"e{row:03}", "r", f"e{row + 1:03}") for row in range(200)])
    paths = [tmp_path / "one.tsv", tmp_path / "two.tsv"]
    for path in paths:
        write_synthetic(path, like, 230)
    rows = _rows(paths[0])
    assert len(rows) == 230
    assert rows[200:] != sorted(rows[200:])
    assert paths[0].read_bytes() == paths[1].read_bytes()
