"""Relations named by a user."""

from __future__ import annotations

from pathlib import Path

import pytest

from dragkit.data.build.graph import Graph
from dragkit.data.build.relation_list import read_names, relation_rows
from dragkit.errors import DataError, MissingInputError

GRAPH = Graph.from_triples(
    [("a", "people.person.gender", "b"), ("b", "location.country.capital", "c"), ("a", " x ", "a")]
)


def test_names_of_a_file_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "exclude.txt"
    path.write_bytes(b"people.person.gender\r\n\n x \npeople.person.gender\n")
    names = read_names(path)
    assert names == [
        (f"{path}:1", "people.person.gender"),
        (f"{path}:3", " x "),
        (f"{path}:4", "people.person.gender"),
    ]
    rows = relation_rows(GRAPH, names)
    assert [GRAPH.relations[row] for row in rows.tolist()] == [" x ", "people.person.gender"]
    assert rows.dtype == "int64"
    assert relation_rows(GRAPH, []).tolist() == []


def test_unknown_names_are_listed_with_near_ones() -> None:
    names = [("--exclude", "people.person.gendre"), ("e.txt:2", " x "), ("e.txt:3", "zzzz")]
    with pytest.raises(DataError) as error:
        relation_rows(GRAPH, names)
    assert str(error.value).splitlines() == [
        "--exclude: relation: the graph has no relation 'people.person.gendre'. Similar ones are "
        "'people.person.gender'.",
        "e.txt:3: relation: the graph has no relation 'zzzz'.",
    ]
    with pytest.raises(DataError, match=r"\.\.\. and 30 more\."):
        relation_rows(GRAPH, [("e.txt", f"{number}") for number in range(50)])


def test_lists_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no such file"):
        read_names(tmp_path / "absent.txt")
    (tmp_path / "bad.txt").write_bytes(b"a\n\xff\n")
    with pytest.raises(DataError, match=r"bad\.txt:2: name: not valid UTF-8"):
        read_names(tmp_path / "bad.txt")
    (tmp_path / "bad.txt").write_bytes(b"a" * (1 << 20))
    with pytest.raises(DataError, match=r"bad\.txt:1: name: the line is too long"):
        read_names(tmp_path / "bad.txt")
