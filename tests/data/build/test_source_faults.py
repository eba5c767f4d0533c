"""Faults of question sources: all of a source together, as file:line: path: reason."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import duckdb
import pytest

from dragkit.data.build.sources import open_source_questions
from dragkit.errors import ConfigError, DataError, MissingInputError


def _faults(path: Path, **options: Any) -> list[tuple[str, int, str, str]]:
    source = open_source_questions(path, **options)
    list(source)
    found = [(p.file.name, p.line, p.path, p.reason) for p in source.problems]
    with pytest.raises(DataError) as error:
        source.check()
    lines = str(error.value).splitlines()
    assert lines[:-1] == [str(problem) for problem in source.problems]
    assert f"{len(found)} of {source.rows} rows" in lines[-1]
    return found


GOOD = b'{"question": "q", "answer": ["a"], "q_entity": ["t"], "graph": [["a", "r", "b"]]}\n'
BAD = {
    b'{"question": "q", "graph": [["a", "r"]]}': "$.graph[0]",
    b'{"question": "q", "graph": [["a", "r", "b"], ["a", null, "b"]]}': "$.graph[1][1]",
    b'{"question": "q", "graph": [["a", "r", "b", "c"]]}': "$.graph[0]",
    b'{"question": 7, "graph": []}': "$.question",
    b'{"question": "q", "graph": [], "answer": [1999]}': "$.answer[0]",
    b'{"question": "q", "graph": [], "q_entity": {}}': "$.q_entity",
    b'{"question": "q"}': "$",
    b'{"graph": []}': "$",
    b'{"question": "q", "graph": [}': "$",
    b'["question"]': "$",
    b'{"question": "q", "graph": []} {}': "$",
    b'{"question": NaN, "graph": []}': "$",
    b'{"question": "\xff", "graph": []}': "$",
    b'{"question": "a\\u0000b", "graph": []}': "$",
    b'{"question": "q", "question": "p", "graph": []}': "$",
    b'{"question": "q", "graph": [], "x": "\\ud800"}': "$",
    b"7": "$",
    b"[" * 100_000: "$",
}


def test_every_bad_json_line_is_reported_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD + b"".join(line + b"\n" + GOOD for line in BAD))
    found = _faults(path)
    assert [(line, where) for _, line, where, _ in found] == [
        (2 * i + 2, where) for i, where in enumerate(BAD.values())
    ]
    source = open_source_questions(path)
    assert len(list(source)) == len(BAD) + 1


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    table = tmp_path / "t.tsv"
    table.write_text("question\tsolution\na\tb\nc\td\n")
    found = _faults(table, columns={"question": "query"})
    assert [(f[1], f[3]) for f in found] == [
        (2, "no column `query` for the question. The columns are question, solution"),
        (1, "no line has this column"),
    ][:1]
    [(_, line, where, reason)] = _faults(table, columns={"answers": "answer"})
    assert (line, where, reason) == (1, "$.answer", "no line has this column")


def test_wrong_rows_of_tables(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes(
        b'question,answers\na,b\na\na,b,c\n"x"y,z\n\xff,b\na\0,b\n"two\nlines",ok\n"open,b\n'
    )
    found = _faults(table)
    assert [f[1] for f in found] == [3, 4, 5, 6, 7, 10]
    assert found[0][3] == "1 columns, where the header has 2"
    plain = tmp_path / "t.tsv"
    plain.write_bytes(b'question\tanswers\na\tb\n"a\tb\nx\n\xff\tb\n\0\tb\n')
    assert [f[1] for f in _faults(plain)] == [4, 5, 6]
    twice = tmp_path / "u.tsv"
    twice.write_bytes(b"question\tquestion\na\tb\n")
    assert _faults(twice)[0][3] == "columns of one name: 'question'"


def test_ids_are_unique_in_a_split(tmp_path: Path) -> None:
    rows = [{"id": i, "question": f"{i}", "answers": "a"} for i in (1, 2, 1)]
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = _faults(tmp_path)
    assert [(f[0], f[1], f[2]) for f in found] == [
        ("train-0.jsonl", 3, "$.id"),
        *(("train-1.jsonl", line, "$.id") for line in (1, 2, 3)),
        ("test.jsonl", 3, "$.id"),
    ]
    assert str(tmp_path / "train-0.jsonl") in found[1][3]


def test_damaged_files(tmp_path: Path) -> None:
    packed = gzip.compress(GOOD * 2000)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:-20])
    assert "truncated" in _faults(tmp_path / "cut.jsonl.gz")[0][3]
    table = tmp_path / "whole.parquet"
    duckdb.connect().execute(f"COPY (SELECT 'q' AS question, 1 AS x) TO '{table}' (FORMAT parquet)")
    data = table.read_bytes()
    for name, content in {
        "short.parquet": data[: len(data) // 2],
        "tail.parquet": data[:4] + bytes(len(data) - 8) + data[-4:],
    }.items():
        (tmp_path / name).write_bytes(content)
        [(_, line, _, reason)] = _faults(tmp_path / name, layout="columns")
        assert line == 1
        assert "cannot be read as parquet" in reason
    [(_, _, where, _)] = _faults(table, columns={"answers": "x"})
    assert where == "$.x"


def test_wrong_values_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    rows = [
        "('q', [['a', 'r', 'b']], ['x'])",
        "(NULL, [['a', 'r', 'b']], ['x'])",
        "('q', [['a', 'r', 'b'], ['a', 'r']], ['x'])",
        "('q', [['a', NULL, 'b']], ['x'])",
        "('q', [NULL], ['x'])",
        "('q', NULL, NULL)",
        "('q', [['a', 'r', 'b' || chr(0)]], [NULL])",
        "('q', [['a', 'r', 'b']], [NULL])",
    ]
    values = f"(VALUES {', '.join(rows)}) t(question, graph, answer)"
    duckdb.connect().execute(f"COPY (SELECT * FROM {values}) TO '{path}' (FORMAT parquet)")
    assert [(f[1], f[2]) for f in _faults(path)] == [
        (2, "$.question"),
        (3, "$.graph[1]"),
        (4, "$.graph[0][1]"),
        (5, "$.graph[0]"),
        (7, "$"),
        (8, "$.answer[0]"),
    ]


def test_wrong_lines_of_text_layouts(tmp_path: Path) -> None:
    metaqa = tmp_path / "qa_train.txt"
    metaqa.write_bytes(b"who is [a]\tb\nno topic\tb\n[a]\n[a]\tb\tc\n\xff [a]\tb\n")
    (tmp_path / "qa_train_qtype.txt").write_text("t\n" * 4)
    found = _faults(metaqa)
    assert [f[:2] for f in found] == [
        *(("qa_train.txt", line) for line in (2, 3, 4, 5)),
        ("qa_train_qtype.txt", 5),
    ]
    path = tmp_path / "PQ.txt"
    path.write_text("q\ta(a/)\tx#r#a\nq\ta\tx#r#a\nq\ta(a/)\tx#r\nq\ta(a/)\tx##a\nq\n")
    assert [f[1] for f in _faults(path)] == [2, 3, 4, 5]


def test_wrong_numbers_and_types_of_nsm(tmp_path: Path) -> None:
    (tmp_path / "entities.txt").write_text("a\nb\n")
    (tmp_path / "relations.txt").write_text("r\n")
    rows = [
        {"question": "q", "entities": [1], "subgraph": {"tuples": [[0, 0, 1]]}},
        {"question": "q", "entities": [2], "subgraph": {"tuples": []}},
        {"question": "q", "entities": [-1], "subgraph": {"tuples": []}},
        {"question": "q", "entities": [], "subgraph": {"tuples": [[0, 0, 1], [0, 1, 0]]}},
        {"question": "q", "entities": [], "subgraph": {"tuples": [[0, 0]]}},
        {"question": "q", "answers": ["x"], "subgraph": {"tuples": []}},
    ]
    path = tmp_path / "dev_simple.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(f[1], f[2]) for f in _faults(path)] == [
        (2, "$.entities[0]"),
        (3, "$.entities[0]"),
        (4, "$.subgraph.tuples[1]"),
        (5, "$.subgraph.tuples[0]"),
        (6, "$.answers[0]"),
    ]
    (tmp_path / "relations.txt").unlink()
    with pytest.raises(MissingInputError, match=r"relations.txt: no such file"):
        list(open_source_questions(path))


def test_wrong_types_of_webqsp(tmp_path: Path) -> None:
    questions = [
        {"QuestionId": "a", "RawQuestion": "q", "Parses": []},
        {"QuestionId": "b", "Parses": []},
        {"QuestionId": "c", "RawQuestion": "q", "Parses": [{"Answers": [{"EntityName": "x"}]}]},
    ]
    path = tmp_path / "WebQSP.test.json"
    path.write_text(json.dumps({"Questions": questions}, indent=0))
    text = path.read_text().splitlines()
    found = _faults(path)
    assert [f[2] for f in found] == ["$.Questions[1]", "$.Questions[2].Parses[0].Answers[0]"]
    for (_, line, _, _), name in zip(found, "bc", strict=True):
        assert f'"QuestionId": "{name}"' in text[line]
    path.write_text(path.read_text()[:-30])
    assert "not valid JSON" in _faults(path)[0][3]


def test_an_unknown_file_lists_what_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "q"}\n')
    with pytest.raises(DataError, match="not recognised") as error:
        open_source_questions(path)
    for name in ("rog", "heuristics", "columns", "metaqa", "pathquestion", "nsm", "webqsp"):
        assert f"\n  {name}: " in str(error.value)
    for content in (b"", b"\n\n", bytes(10), b"just text\n", b"[]", b"{"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not recognised"):
            open_source_questions(path)
    # Stated, it is read as such.
    path.write_bytes(b"\n")
    with pytest.raises(DataError, match="holds no question"):
        open_source_questions(path, layout="metaqa").check()


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="without files of questions"):
        open_source_questions(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    (tmp_path / "test.tsv").write_text("question\tanswers\na\tb\n")
    with pytest.raises(DataError, match="several layouts"):
        open_source_questions(tmp_path)


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    pointer = tmp_path / "lfs.parquet"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for path in (tmp_path / "pipe.jsonl", pointer, tmp_path / "none.jsonl"):
        with pytest.raises(MissingInputError, match=str(path)):
            open_source_questions(path)
    fake = tmp_path / "a.jsonl.gz"
    fake.write_bytes(GOOD)
    with pytest.raises(DataError, match="not gzip"):
        open_source_questions(fake)


def test_wrong_options_are_usage_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    with pytest.raises(ConfigError, match="The fields are: question"):
        open_source_questions(path, columns={"answer": "x"})
    with pytest.raises(ConfigError, match="There are: rog"):
        open_source_questions(path, layout="squad")
    with pytest.raises(ConfigError, match="limit_triples"):
        open_source_questions(path, limit_triples=-1)
