"""Graph files of every layout and compression, and what is said where they are faulty."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dragkit.data.build import graph_files
from dragkit.data.build.graph import Graph
from dragkit.data.build.graph_store import open_graph
from dragkit.errors import ConfigError, DataError, DragkitError, MissingInputError
from tests.data.build.graph_layouts import (
    Triple,
    as_csv,
    as_ntriples,
    as_tsv,
    assert_same_graph,
    write_graph,
)

# Mostly what a reader could trim, unquote, split at or take for nothing.
_SPELT = ("NULL", "NA", "nan", "null", '""', "\\N", "#", "a", " a", "a ", "é", "e\u0301", "\u200b")
_CHARS = st.sampled_from("\"\\, '|#\r\x0b\x0c\x1c\x1f\x85\u2028\ufeff😀\U0010ffff")
_ANY = _CHARS | st.characters(exclude_categories=["Cs"], exclude_characters="\0")
NAMES = st.sampled_from(_SPELT) | st.text(_ANY, min_size=1, max_size=8)
LINE_NAMES = NAMES.filter(lambda name: not set(name) & set("\t\n"))
IRIS = st.text(_ANY, min_size=1, max_size=8).filter(
    lambda name: not set(name) & set('<>"\\') and min(name) > " "
)
# A carriage return at the end of a line belongs to the line, and a byte order mark to the file.
TAILS = LINE_NAMES.filter(lambda name: not name.endswith("\r"))
HEADS = LINE_NAMES.filter(lambda name: not name.startswith("\ufeff"))
WRITERS: dict[str, tuple[Callable, tuple]] = {
    "tsv": (as_tsv, (HEADS, LINE_NAMES, TAILS)),
    "csv": (as_csv, (NAMES.filter(lambda name: not name.startswith("\ufeff")), NAMES, NAMES)),
    "nt": (as_ntriples, (IRIS, IRIS, NAMES)),
}


def _check_round_trip(suffix: str, triples: Sequence[Triple]) -> None:
    write = WRITERS[suffix.partition(".")[0]][0]
    with tempfile.TemporaryDirectory() as folder:
        path = write_graph(Path(folder), f"graph.{suffix}", write(triples))
        graph = open_graph([path], cache_dir=folder)
        assert_same_graph(graph, Graph.from_triples(triples))


@pytest.mark.parametrize("suffix", ["tsv", "csv", "nt", "tsv.gz", "csv.gz", "nt.gz"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_names_come_back_byte_for_byte(suffix: str, data: st.DataObject) -> None:
    names = WRITERS[suffix.partition(".")[0]][1]
    _check_round_trip(suffix, data.draw(st.lists(st.tuples(*names), min_size=1, max_size=8)))


@pytest.mark.parametrize("suffix", ["tsv.zst", "csv.zst", "nt.zst"])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_names_in_zstandard_come_back_byte_for_byte(suffix: str, data: st.DataObject) -> None:
    """Without line ends within names, as DuckDB gives the lines, and without the noncharacter."""
    names = [
        strategy.filter(lambda name: not set(name) & set("\r\n\U0010ffff\ufeff"))
        for strategy in WRITERS[suffix.partition(".")[0]][1]
    ]
    _check_round_trip(suffix, data.draw(st.lists(st.tuples(*names), min_size=1, max_size=8)))


@pytest.mark.parametrize("suffix", ["tsv", "csv", "nt", "tsv.zst", "nt.zst", "csv.gz"])
def test_a_name_of_a_megabyte(suffix: str) -> None:
    _check_round_trip(suffix, [("a" * 1_000_000, "r", "é" * 500_000), ("b", "r", "c")])


def _naive(content: bytes) -> list[Triple] | set[int]:
    """Facts of separated text, or the numbers of its faulty lines."""
    triples, faulty = [], set()
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        line = line[:-1] if line.endswith(b"\r") else line
        if not line:
            continue
        try:
            names = line.decode().split("|")
        except UnicodeDecodeError:
            names = [""]
        if len(names) == 3 and all(names) and "\0" not in line.decode():
            triples.append(tuple(names))
        else:
            faulty.add(number)
    return faulty or triples


_TOKENS = [b"a", b"b", b"|", b"|", b"\n", b"\r\n", b"a|r|b\n", b"a|r|c\n", b"b|s|a\n", b"\r"]
_TOKENS += [b"\0", b"\xff", b'"', b" ", "é".encode(), b"\x01", b"\xef\xbb\xbf"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(_TOKENS), max_size=30).map(b"".join))
@example(b"a|r|b|\n")
@example(b"a|r|b\0\n")
@example(b"a|r|b\na|r|b\0\0\0\0")
@example(b"\x01\n")
@example(b"a|r|b\rc|r|d\r")
@example(b"\n\na|r|b\n\n")
@example(b"\n\r\na")
def test_any_bytes_are_read_or_refused_line_by_line(content: bytes) -> None:
    """The gzip form goes another way, and says the same."""
    expected = _naive(content)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("graph.txt", "graph.txt.gz"):
            path = write_graph(Path(folder), name, content)
            if expected and isinstance(expected, list):
                graph = open_graph([path], separator="|", cache_dir=folder)
                assert_same_graph(graph, Graph.from_triples(expected))
                continue
            with pytest.raises(DataError) as error:
                open_graph([path], separator="|", cache_dir=folder)
            lines = str(error.value).splitlines()
            if not expected:
                assert "no facts" in lines[0]
                continue
            assert [line.split(": ")[0] for line in lines[:-1]] == [
                f"{path}:{number}" for number in sorted(expected)
            ]


FAULTY = {
    "tsv": b"a\tr\tb\na\tr\na\tr\tb\tc\n\tr\tb\na\t\xff\tb\na\tr\tb\0\na\tr\t\n",
    "csv": b'a,r,b\na,r\na,r,b,c\n"",r,b\na,\xff,b\na,r,b\0\n"a"x,r,b\na,r,b\n"a,r,b\n',
    "nt": b'<a> <r> <b> .\n<a> <r> <b>\n<a> "r" <b> .\n<> <r> <b> .\n<a> <\xff> <b> .\n'
    b'<a> <r> "\\u0000" .\n<a> <r> "\\x" .\n# c\n<a> <r> "\\ud800" .\n',
}
REASONS = {
    "tsv": [
        r"2: columns: 2 found, 3 expected, with '\t' between them",
        r"3: columns: 4 found, 3 expected, with '\t' between them",
        "4: head: an empty name",
        "5: relation: not valid UTF-8",
        "6: tail: a NUL character",
        "7: tail: an empty name",
    ],
    "csv": [
        "2: columns: 2 found, 3 expected, with ',' between them",
        "3: columns: 4 found, 3 expected, with ',' between them",
        "4: head: an empty name",
        "5: relation: not valid UTF-8",
        "6: tail: a NUL character",
        "7: line: no row of CSV: ',' expected after '\"'",
        "9: line: no row of CSV: unexpected end of data",
    ],
    "nt": [
        "2: line: no statement of N-Triples.",
        "3: line: no statement of N-Triples.",
        "4: head: an empty name",
        "5: relation: not valid UTF-8",
        "6: tail: a NUL character",
        r"7: line: the escape \x stands for no character",
        "9: line: not valid UTF-8, or a surrogate alone is escaped",
    ],
}


def test_all_faults_of_all_files_are_listed_together(tmp_path: Path) -> None:
    paths, expected = [], []
    for suffix, content in FAULTY.items():
        for ending in ("", ".gz"):
            paths.append(write_graph(tmp_path, f"graph.{suffix}{ending}", content))
            expected += [f"{paths[-1]}:{reason}" for reason in REASONS[suffix]]
    good = write_graph(tmp_path, "good.tsv", b"a\tr\tb\n")
    with pytest.raises(DataError) as error:
        open_graph([*paths[:2], good, *paths[2:]], cache_dir=tmp_path / "cache")
    lines = str(error.value).splitlines()
    assert lines[-1] == f"{len(expected)} lines of the graph cannot be used."
    for line, begin in zip(lines[:-1], expected, strict=True):
        assert line.startswith(begin)
    assert list((tmp_path / "cache").rglob("*.npy")) == []


def test_a_hundred_faults_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    path = write_graph(tmp_path, "graph.tsv", b"a\tr\n" * 250)
    with pytest.raises(DataError) as error:
        open_graph([path], cache_dir=tmp_path)
    lines = str(error.value).splitlines()
    assert lines[99].startswith(f"{path}:100: columns: 2 found")
    assert lines[100:] == ["... and 150 more.", "250 lines of the graph cannot be used."]


def test_a_line_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("graph_files", "graph_rows", "graph_load"):
        monkeypatch.setattr(f"dragkit.data.build.{module}.MAX_LINE_BYTES", 1000)
    for suffix in ("tsv", "csv", "nt"):
        content = WRITERS[suffix][0]([("a", "r", "b"), ("a", "r", "c" * 1000), ("a", "", "d")])
        path = write_graph(tmp_path, f"graph.{suffix}", content)
        with pytest.raises(DataError) as error:
            open_graph([path], cache_dir=tmp_path)
        lines = str(error.value).splitlines()
        assert lines[0] == f"{path}:2: line: 1000 bytes or more are too long"
        assert lines[1] == f"{path}:3: relation: an empty name"


@pytest.mark.parametrize(
    ("name", "content", "columns", "separator"),
    [
        ("a.tsv", b"a\tr\tb\n", None, None),
        ("a.tab", b"a\tr\tb\r\n", None, None),
        ("a.csv", b"a,r,b\r\n", None, None),
        ("a.csv", b"\xef\xbb\xbfhead,relation,tail\na,r,b\n", None, None),
        ("a.tsv", b"\n\nSubject\tPredicate\tObject\n\na\tr\tb\n", None, None),
        ("a.csv", b'"head","relation","tail"\n\n"a","r","b"\n', None, None),
        ("a.tsv", b"head\trelation\ttail\r\na\tr\tb\n", None, None),
        ("a.tsv", b"head\trelation\ttail\na\tr\tb\r\n", None, None),
        ("a.csv", b"a;r;b\n", None, ";"),
        ("a.txt", b"a|r|b\n", None, "|"),
        ("a.dat", b"a ||| r ||| b\n", None, " ||| "),
        ("a.it's", b"a'r'b\n", None, "'"),
        ("a.tsv", b"1\tb\ta\tx\tr\n", ("3", "5", "2"), None),
        ("a.tsv", b"tail\tx\trel\thead\nb\t\tr\ta\n", ("head", "rel", "tail"), None),
        ("a.csv", b'"the ""tail""",x,"two\nlines",head\nb,,r,a\n', None, None),
        ("a.tsv", b"head\trelation\ttail\na\tr\tb\n", ("1", "2", "3"), None),
    ],
)
def test_columns_separators_and_headers(
    tmp_path: Path, name: str, content: bytes, columns: Sequence[str] | None, separator: str | None
) -> None:
    if b"two\nlines" in content:
        columns = ("head", "two\nlines", 'the "tail"')
    path = write_graph(tmp_path, name, content)
    graph = open_graph([path], columns=columns, separator=separator, cache_dir=tmp_path)
    expected = [("a", "r", "b")]
    if columns == ("1", "2", "3"):
        expected.append(("head", "relation", "tail"))
    assert_same_graph(graph, Graph.from_triples(expected))


def test_the_log_says_how_a_file_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_graph(tmp_path, "a.csv", b"t,h,r,x\nb,a,r,0\n")
    with caplog.at_level("INFO"):
        open_graph([path], columns=("h", "r", "t"), cache_dir=tmp_path)
    assert (
        f"{path}: read as CSV with separator ',', columns 2, 3, 1 of 4, after a header"
        in caplog.messages
    )


@pytest.mark.parametrize(
    ("name", "content", "options", "kind", "words"),
    [
        ("a.ttl", b"@prefix", {}, MissingInputError, "riot --output=ntriples"),
        ("a.nq.gz", b"", {}, MissingInputError, "riot --output=ntriples"),
        ("a.dat", b"", {}, MissingInputError, "Its name may end in .tsv, .tab"),
        ("a.nt", b"", {"separator": "|"}, ConfigError, "N-Triples have no columns"),
        ("a.nt", b"", {"columns": ("1", "2", "3")}, ConfigError, "N-Triples have no columns"),
        ("a.csv", b"", {"separator": "||"}, ConfigError, "Name one character"),
        ("a.tsv", b"", {"separator": "\n"}, ConfigError, "Name one character"),
        ("a.tsv", b"", {"separator": ""}, ConfigError, "Name one character"),
        ("a.tsv", b"", {"columns": ("1", "2")}, ConfigError, "2 given, 3 needed"),
        ("a.tsv", b"a\tb\n", {"columns": ("1", "2", "3")}, DataError, "1: columns: 2 found"),
        ("a.tsv", b"a\tb\tc\n", {"columns": ("0", "1", "2")}, DataError, "The first is 1"),
        ("a.tsv", b"h\tr\tt\n", {"columns": ("h", "r", "x")}, DataError, "1: header: 0 columns"),
        ("a.tsv", b"h\th\tt\n", {"columns": ("h", "t", "t")}, DataError, "1: header: 2 columns"),
        ("a.tsv", b"", {}, DataError, "no facts"),
        ("a.nt", b"# only a comment\n\n", {}, DataError, "no facts"),
        ("a.tsv", b"head\trelation\ttail\n", {}, DataError, "no facts"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, name: str, content: bytes, options: dict, kind: type, words: str
) -> None:
    path = write_graph(tmp_path, name, content)
    with pytest.raises(kind) as error:
        open_graph([path], cache_dir=tmp_path, **options)
    assert words in str(error.value)


def test_a_compression_that_is_only_in_the_name(tmp_path: Path) -> None:
    for name, words in (("a.tsv.gz", "not gzip"), ("a.tsv.zst", "not Zstandard")):
        path = tmp_path / name
        path.write_bytes(b"a\tr\tb\n")
        with pytest.raises(DataError, match=words):
            open_graph([path], cache_dir=tmp_path)


def test_a_compression_that_the_name_does_not_say(tmp_path: Path) -> None:
    for ending in (".gz", ".zst"):
        path = write_graph(tmp_path, f"a.tsv{ending}", b"a\tr\tb\n")
        plain = path.rename(tmp_path / "a.tsv")
        assert open_graph([plain], cache_dir=tmp_path).num_facts == 1


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tsv")
    (tmp_path / "folder.tsv").mkdir()
    (tmp_path / "pointer.tsv").write_text("version https://git-lfs.github.com/spec/v1\noid 0\n")
    for name, words in (
        ("absent.tsv", "no such file"),
        ("pipe.tsv", "a pipe"),
        ("folder.tsv", "a folder"),
        ("pointer.tsv", "git lfs pull"),
    ):
        with pytest.raises(DragkitError, match=words) as error:
            open_graph([tmp_path / name], cache_dir=tmp_path)
        assert error.value.exit_code == 66


def test_a_path_is_a_name_and_no_pattern(tmp_path: Path) -> None:
    for name in ("a*.tsv", "[a].tsv", "a?.tsv", "it's {a,b}.tsv", "x=1.tsv", "ab.tsv"):
        path = write_graph(tmp_path, name, f"{name}\tr\tb\n".encode())
        assert list(graph_entities(path, tmp_path)) == sorted([name, "b"])


def graph_entities(path: Path, cache: Path) -> list[str]:
    graph = open_graph([path], cache_dir=cache)
    return [graph.entities[row] for row in range(graph.num_entities)]


def test_the_first_line_is_found_below_blank_ones(tmp_path: Path) -> None:
    path = write_graph(tmp_path, "a.csv", b'\n\r\n"x\ny",r,b\n')
    file = graph_files.inspect_file(path, ("1", "2", "3"), None, graph_files.GraphFaults())
    assert file is not None
    assert (file.first_line, file.width) == (3, 3)
    assert graph_entities(path, tmp_path) == ["b", "x\ny"]


@pytest.mark.parametrize(
    ("line", "is_header"),
    [
        ("subject,relation,object", True),
        ("Head, Predicate ,TAIL", True),
        ("from,edge,to", True),
        ("head,relation,head", False),
        ("relation,head,tail", False),
        ("head,relation,France", False),
    ],
)
def test_a_first_line_of_usual_names_is_a_header(
    line: str, is_header: bool, tmp_path: Path
) -> None:
    path = tmp_path / "kg.csv"
    path.write_text(f"{line}\nLyon,in,France\n")
    assert open_graph([path], cache_dir=tmp_path).num_facts == 2 - is_header
