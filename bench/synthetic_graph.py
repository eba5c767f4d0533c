"""A large graph file with the relations and degrees of a real one. Its facts are made up.

The real facts are repeated in copies. A copy has entities of its own, except for the entities with
many facts, which all copies share, so that they grow with the graph as real ones do. The tail of a
fact lies in a random copy, so the copies hang together. The distribution of the relations, of the
facts of a head, and of the relations of an entity thus stays that of the real graph.

    python -m bench.synthetic_graph graph.tsv --facts 10000000 --like kb.tsv.gz
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from dragkit.data.build.graph import Graph
from dragkit.data.build.graph_store import open_graph

# An entity with more facts is one entity in all copies.
_SHARED_DEGREE = 1000


def write_synthetic(path: Path, like: Graph, num_facts: int, *, seed: int = 0) -> None:
    """Writes a TSV file.

    Args:
        path: the file.
        like: the real graph.
        num_facts: number of lines. A few facts occur twice.
        seed: of the copies in which the tails lie.
    """
    rng = np.random.default_rng(seed)
    copies = -(-num_facts // like.num_facts)
    names = [like.entities[row] for row in range(like.num_entities)]
    relations = [like.relations[row] for row in range(len(like.relations))]
    shared = like.degree() > _SHARED_DEGREE
    head, relation, tail = (rows.tolist() for rows in (like.head, like.relation, like.tail))
    relation_of = [relations[row] for row in relation]
    left = num_facts
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for copy in range(copies):
            own = [
                name if is_shared else f"{name} {copy}"
                for name, is_shared in zip(names, shared.tolist(), strict=True)
            ]
            other = np.where(shared[like.tail], -1, rng.integers(copies, size=like.num_facts))
            lines = [
                f"{own[h]}\t{r}\t{names[t]} {c}\n" if c >= 0 else f"{own[h]}\t{r}\t{names[t]}\n"
                for h, r, t, c in zip(head, relation_of, tail, other.tolist(), strict=True)
            ]
            # The last copy is cut at random, because the facts are sorted by head.
            if left < len(lines):
                lines = [lines[row] for row in rng.permutation(len(lines))[:left].tolist()]
            file.writelines(lines)
            left -= len(lines)


def main() -> None:
    """Writes the file that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--facts", type=int, required=True)
    parser.add_argument("--like", type=Path, required=True, help="a real graph file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_synthetic(options.path, open_graph([options.like]), options.facts, seed=options.seed)


if __name__ == "__main__":
    main()
