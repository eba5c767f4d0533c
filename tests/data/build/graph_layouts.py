"""Files of a graph in every layout and compression."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import duckdb
import numpy as np

from dragkit.data.build.graph import Graph

Triple = tuple[str, str, str]


def as_tsv(triples: Iterable[Triple]) -> bytes:
    return "".join("\t".join(triple) + "\n" for triple in triples).encode()


def as_csv(triples: Iterable[Triple]) -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows(triples)
    return buffer.getvalue().encode()


def as_ntriples(triples: Iterable[Triple]) -> bytes:
    """IRIs where the name can be one, else literals. Some characters are escaped."""

    def term(name: str) -> str:
        if not set(name) & set('<>"\\') and all(char > " " for char in name):
            return f"<{name}>"
        letters = {"\n": "\\n", "\r": "\\r", '"': '\\"', "\\": "\\\\"}
        return '"' + "".join(letters.get(char, char) for char in name) + '"@en'

    return "".join(f"<{h}> <{r}> {term(t)} . # x\n" for h, r, t in triples).encode()


def zstd(content: bytes, folder: Path) -> bytes:
    """Compresses lines. Each must be UTF-8 and end with a newline."""
    plain, packed = folder / "plain.lines", folder / "packed.lines"
    plain.write_bytes(content)
    options = f"header false, delimiter '{chr(0x10FFFF)}', quote '', escape ''"
    columns = "columns = {'line': 'VARCHAR'}, auto_detect = false, header = false"
    duckdb.sql(
        f"COPY (SELECT * FROM read_csv('{plain}', {columns}, delim = '{chr(0x10FFFF)}', "
        f"quote = '', escape = '', comment = '', max_line_size = 10000000)) "
        f"TO '{packed}' (FORMAT csv, {options}, COMPRESSION zstd)"
    )
    return packed.read_bytes()


def write_graph(folder: Path, name: str, content: bytes) -> Path:
    """Writes a file, compressed as its name says."""
    path = folder / name
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    elif path.suffix == ".zst":
        content = zstd(content, folder)
    path.write_bytes(content)
    return path


def assert_same_graph(graph: Graph, expected: Graph) -> None:
    for name in ("head", "relation", "tail", "head_ptr", "tail_order", "tail_ptr"):
        ours, theirs = getattr(graph, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype, name
        assert np.array_equal(ours, theirs), name
    for name in ("entities", "relations"):
        names: Sequence[str] = getattr(graph, name)
        assert [names[row] for row in range(len(names))] == getattr(expected, name)
