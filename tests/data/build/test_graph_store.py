"""The cache of a graph: its key, what a damaged or half one leads to, and a graph beyond memory."""

from __future__ import annotations

import csv
import gzip
import io
import multiprocessing
import os
import random
import signal
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from dragkit.data.build import graph_store
from dragkit.data.build.database import connect
from dragkit.data.build.graph import Graph
from dragkit.data.build.graph_store import open_graph
from dragkit.data.build.zstandard import ZSTD_MAGIC
from dragkit.errors import ConfigError, DataError, WriteError
from tests.data.build.graph_layouts import Triple, as_csv, as_tsv, assert_same_graph, write_graph

FACTS = [("a", "r", "b"), ("b", "s", "c"), ("c", "r", "c"), ("a", "r", "b"), ("Ω", "r", "a")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_graph(tmp_path, "graph.tsv", as_tsv(FACTS))


def _random_facts(count: int, seed: int) -> list[Triple]:
    draw = random.Random(seed)
    names = [f"{draw.random()} {'x' * draw.randrange(40)}" for _ in range(count // 4)]
    return [
        (draw.choice(names), f"r{draw.randrange(90)}", draw.choice(names)) for _ in range(count)
    ]


def test_several_files_are_one_graph(tmp_path: Path) -> None:
    facts = _random_facts(3000, seed=1)
    paths = [
        write_graph(tmp_path, "one.tsv.gz", as_tsv(facts[:1000])),
        write_graph(tmp_path, "two.csv", as_csv(facts[500:2500])),
        write_graph(tmp_path, "three.tsv.zst", as_tsv(facts[2500:])),
        write_graph(tmp_path, "empty.tsv", b""),
    ]
    expected = Graph.from_triples(facts)
    assert_same_graph(open_graph(paths, cache_dir=tmp_path), expected)
    (folder,) = (tmp_path / graph_store.CACHE_FOLDER).iterdir()
    assert_same_graph(open_graph(paths[::-1], cache_dir=tmp_path), expected)
    assert list((tmp_path / graph_store.CACHE_FOLDER).iterdir()) == [folder]
    assert not any(entry.is_dir() for entry in folder.iterdir())


def test_chunks_threads_and_little_memory_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = _random_facts(60_000, seed=2)
    path = write_graph(tmp_path, "graph.tsv", as_tsv(facts))
    expected = Graph.from_triples(facts)
    assert_same_graph(open_graph([path], cache_dir=tmp_path / "a", threads=1), expected)
    monkeypatch.setattr(graph_store, "_CHUNK", 1000)
    monkeypatch.setattr(graph_store, "_LINES_AT_ONCE", 7000)
    graph = open_graph([path], cache_dir=tmp_path / "b", threads=3, memory_limit="60MB")
    assert_same_graph(graph, expected)


def test_duckdb_prints_and_fetches_nothing() -> None:
    names = ("enable_progress_bar", "autoinstall_known_extensions", "autoload_known_extensions")
    with connect() as connection:
        for name in names:
            assert connection.execute(f"SELECT current_setting('{name}')").fetchall() == [(False,)]


def test_too_little_memory_is_said(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="memory limit 1KB: .* Raise the limit"):
        open_graph([path], cache_dir=tmp_path, memory_limit="1KB")


@pytest.mark.parametrize("limit", ["", "lots", "1"])
def test_a_memory_limit_that_is_no_size(path: Path, tmp_path: Path, limit: str) -> None:
    with pytest.raises(ConfigError, match="memory limit"):
        open_graph([path], cache_dir=tmp_path, memory_limit=limit)


def test_a_second_opening_reads_no_fact(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_graph([path], cache_dir=tmp_path)

    def never(*_: object) -> None:
        raise AssertionError("loaded again")

    monkeypatch.setattr(graph_store, "load_file", never)
    copy = path.rename(tmp_path / "other.tsv")
    assert_same_graph(open_graph([copy], cache_dir=tmp_path), Graph.from_triples(FACTS))
    with pytest.raises(AssertionError, match="loaded again"):
        open_graph([copy], columns=("1", "2", "1"), cache_dir=tmp_path)
    copy.write_bytes(copy.read_bytes() + b"d\tr\td\n")
    with pytest.raises(AssertionError, match="loaded again"):
        open_graph([copy], cache_dir=tmp_path)


def test_the_cache_of_the_good_files_hides_no_bad_one(path: Path, tmp_path: Path) -> None:
    open_graph([path], cache_dir=tmp_path)
    bad = write_graph(tmp_path, "bad.csv", b'"a\n')
    with pytest.raises(DataError, match=r"bad\.csv: line: the first line cannot be read"):
        open_graph([path, bad], columns=("1", "2", "3"), cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["head.npy", "entities.bytes.npy", "meta.json", "manifest.json"])
def test_a_damaged_cache_is_rebuilt(name: str, path: Path, tmp_path: Path) -> None:
    open_graph([path], cache_dir=tmp_path)
    (folder,) = (tmp_path / graph_store.CACHE_FOLDER).iterdir()
    for content in ((folder / name).read_bytes()[:-1], None):
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        assert_same_graph(open_graph([path], cache_dir=tmp_path), Graph.from_triples(FACTS))
    assert list((tmp_path / graph_store.CACHE_FOLDER).iterdir()) == [folder]


def test_a_file_that_changes_while_it_is_read(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = graph_store.load_file

    def grow(*args: object) -> None:
        load(*args)  # type: ignore[arg-type]
        path.write_bytes(path.read_bytes() * 2)

    monkeypatch.setattr(graph_store, "load_file", grow)
    with pytest.raises(DataError, match="changed while it was read"):
        open_graph([path], cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache" / graph_store.CACHE_FOLDER).iterdir()) == []


def test_a_cache_that_cannot_be_written(path: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(WriteError, match="DRAGKIT_CACHE"):
        open_graph([path], cache_dir=blocked)


def test_a_full_disk(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DuckDB's own words for it reach the user."""
    import duckdb

    def full(*_: object) -> None:
        raise duckdb.IOException("Could not write file: No space left on device")

    monkeypatch.setattr(graph_store, "load_file", full)
    with pytest.raises(WriteError, match="No space left on device"):
        open_graph([path], cache_dir=tmp_path)
    assert list((tmp_path / graph_store.CACHE_FOLDER).iterdir()) == []


def _build(path: Path, cache: Path, slow: bool, results: object) -> None:
    if slow:
        seal = graph_store.seal_folder

        def slow_seal(folder: Path, meta: dict) -> None:
            results.put("written")  # type: ignore[attr-defined]
            time.sleep(60)
            seal(folder, meta)

        graph_store.seal_folder = slow_seal
    results.put(open_graph([path], cache_dir=cache).num_facts)  # type: ignore[attr-defined]


def test_a_killed_builder_leaves_no_half_cache(path: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    builder = context.Process(target=_build, args=(path, tmp_path, True, results))
    builder.start()
    assert results.get(timeout=60) == "written"
    os.kill(builder.pid, signal.SIGKILL)  # type: ignore[arg-type]
    builder.join()
    (left,) = (tmp_path / graph_store.CACHE_FOLDER).iterdir()
    assert left.name.startswith(".")
    assert_same_graph(open_graph([path], cache_dir=tmp_path), Graph.from_triples(FACTS))


def test_concurrent_builders_all_succeed(path: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    builders = [
        context.Process(target=_build, args=(path, tmp_path, False, results)) for _ in range(3)
    ]
    for builder in builders:
        builder.start()
    assert [results.get(timeout=120) for _ in builders] == [4] * 3
    for builder in builders:
        builder.join()
    assert len(list((tmp_path / graph_store.CACHE_FOLDER).iterdir())) == 1


def _open_or_refuse(content: bytes, path: Path) -> Graph | str:
    path.write_bytes(content)
    try:
        return open_graph([path], cache_dir=path.parent)
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("suffix", ["tsv", "csv", "nt"])
def test_gzip_that_is_cut_or_damaged(suffix: str, tmp_path: Path) -> None:
    line = {"tsv": b"a\tr\tb\n", "csv": b"a,r,b\n", "nt": b"<a> <r> <b> .\n"}[suffix]
    content = gzip.compress(line * 1000, mtime=0)
    path = tmp_path / f"graph.{suffix}.gz"
    flipped = bytearray(content)
    flipped[-5] ^= 1
    for damaged in (content[:-1], content[: len(content) // 2], content[:20], bytes(flipped)):
        message = _open_or_refuse(damaged, path)
        assert isinstance(message, str)
        assert message.startswith(f"{path}:")
        assert "gzip data is cut or damaged" in message or "first line cannot be read" in message
    assert isinstance(_open_or_refuse(content * 2, path), Graph)


def _raw_frame(content: bytes, *, checksum: bool = False, single: bool = True) -> bytes:
    """A Zstandard frame of one block that is not compressed, as the format says."""
    size = len(content).to_bytes(4, "little") if single else b"\x38"
    descriptor = bytes([(0xA0 if single else 0) | (4 if checksum else 0)])
    block = (1 | len(content) << 3).to_bytes(3, "little") + content
    return ZSTD_MAGIC + descriptor + size + block + (b"\0" * 4 if checksum else b"")


def test_zstandard_is_read_whole_or_refused(tmp_path: Path) -> None:
    """DuckDB alone takes a file that is cut between two blocks or lines."""
    facts = [(f"entity {row * row}", "r", f"{row}") for row in range(30_000)]
    path = write_graph(tmp_path, "graph.tsv.zst", as_tsv(facts))
    content, expected = path.read_bytes(), Graph.from_triples(facts)
    skippable = b"\x50\x2a\x4d\x18\x03\0\0\0abc"
    for whole in (content, content + skippable, skippable + content[:0] + content):
        graph = _open_or_refuse(whole, path)
        if whole.startswith(ZSTD_MAGIC):
            assert isinstance(graph, Graph)
            assert_same_graph(graph, expected)
        else:
            # The first bytes say what a file is, and those of a skippable frame do not.
            assert graph == f"{path}: the name ends in .zst, but the content is not Zstandard."
    for end in [4, 5, 6, 9, *range(20, len(content), len(content) // 40), len(content) - 1]:
        message = _open_or_refuse(content[:end], path)
        assert isinstance(message, str), end
        assert "Zstandard data is cut" in message
    behind = _open_or_refuse(content + b"garbage", path)
    assert isinstance(behind, str)
    assert "something else behind" in behind
    raw = _raw_frame(b"a\tr\tb\n") + _raw_frame(b"c\tr\td\n", single=False)
    graph = _open_or_refuse(raw, path)
    assert isinstance(graph, Graph)
    assert graph.triples(range(2)) == [("a", "r", "b"), ("c", "r", "d")]


@pytest.mark.parametrize("end", [b"", b"\n", b"\na\tr\tc", b"\n\n"])
def test_no_line_is_lost_at_the_end_of_a_buffer(
    end: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DuckDB alone loses the last line where it starts with a buffer."""
    for module in ("graph_files", "graph_rows", "graph_load"):
        monkeypatch.setattr(f"dragkit.data.build.{module}.MAX_LINE_BYTES", 600)
    for before in (594, 600, 606, 1200):
        content = b"a\tr\tb\n" * (before // 6) + b"a\tr\t" + b"d" * 300 + end
        facts = [tuple(line.split("\t")) for line in content.decode().split("\n") if line]
        for name in ("graph.tsv", "graph.tsv.gz"):
            path = write_graph(tmp_path, name, content)
            assert_same_graph(open_graph([path], cache_dir=tmp_path), Graph.from_triples(facts))
        path = tmp_path / "graph.tsv.zst"
        graph = _open_or_refuse(_raw_frame(content), path)
        assert isinstance(graph, Graph) or "DuckDB loses lines" in graph
        if isinstance(graph, Graph):
            assert_same_graph(graph, Graph.from_triples(facts))


def test_faults_in_zstandard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "graph.tsv.zst"
    for module in ("graph_files", "graph_load"):
        monkeypatch.setattr(f"dragkit.data.build.{module}.MAX_LINE_BYTES", 1000)
    message = _open_or_refuse(_raw_frame(b"a\tr\tb\n\na\tr\n\tr\tb\na\tr\tb\0\n"), path)
    assert isinstance(message, str)
    assert [line.split(": ")[:2] for line in message.splitlines()[:-1]] == [
        [f"{path}:3", "columns"],
        [f"{path}:4", "head"],
        [f"{path}:5", "tail"],
    ]
    for content, words in (
        (b"a\tr\tb\na\tr\t\xff\n", "not valid UTF-8. Decompress the file"),
        (b"a\tr\tb\na\tr\tb\r\n", "some lines end with a carriage return"),
        (b"a\tr\tb\na\tr\t" + b"b" * 5_000, "too long. Decompress"),
    ):
        message = _open_or_refuse(_raw_frame(content), path)
        assert isinstance(message, str)
        assert words in message
    graph = _open_or_refuse(_raw_frame(b"a\tr\tb\r\nc\tr\td\r\n"), path)
    assert isinstance(graph, Graph)
    assert graph.num_facts == 2


@pytest.mark.parametrize("name", ["metaqa", "freebase_pool"])
def test_real_graphs_equal_the_csv_module(name: str, kgqa_data: Path, tmp_path: Path) -> None:
    source = kgqa_data / "kb" / f"{name}.tsv.gz"
    text = zlib.decompress(source.read_bytes(), wbits=31).decode()
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter="\t", quoting=csv.QUOTE_NONE)
    facts = [(head, relation, tail) for head, relation, tail in reader]
    graph = open_graph([source], cache_dir=tmp_path)
    assert_same_graph(graph, Graph.from_triples(facts))
    assert graph.num_facts == len(set(facts)) == np.diff(graph.tail_ptr).sum()
