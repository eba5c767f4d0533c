"""Miniatures of published layouts: what they are recognised as, and the questions in them."""

from __future__ import annotations

import csv
import gzip
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dragkit.data.build.source_question import group_of_id, split_of_name
from dragkit.data.build.sources import SourceQuestion, open_source_questions
from dragkit.data.question_file import read_questions
from dragkit.errors import MissingInputError

ROG = [
    {
        "id": "WebQTrn-3_ab",
        "question": "where is the guild?",
        "answer": ["Dunmarsh", "Dunmarsh"],
        "q_entity": ["Lantern Guild"],
        "a_entity": ["Dunmarsh"],
        "graph": [["Lantern Guild", "seat", "Dunmarsh"], ["a", "r", "b"], ["a", "r", "b"]],
    },
    {
        "id": "WebQTrn-4_cd",
        "question": "who? \u00e9 \U0001f98a",
        "answer": [],
        "q_entity": [],
        "a_entity": [],
        "graph": [],
    },
]


def _read(path: Path | str, **options: Any) -> list[SourceQuestion]:
    source = open_source_questions(path, **options)
    items = list(source)
    source.check()
    # A second pass reads the same.
    assert list(source) == items
    return items


def _lines(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def _parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    source = _lines(path.with_suffix(".json"), rows)
    types_of = {"graph": "VARCHAR[][]", "answer": "VARCHAR[]", "q_entity": "VARCHAR[]"}
    types_of |= {"a_entity": "VARCHAR[]", "id": "VARCHAR", "question": "VARCHAR"}
    columns = ", ".join(f"{key}: '{kind}'" for key, kind in types_of.items())
    query = f"COPY (SELECT * FROM read_json('{source}', columns={{{columns}}})) TO '{path}'"
    duckdb.connect().execute(query + " (FORMAT parquet)")
    source.unlink()
    return path


def _check_rog(items: list[SourceQuestion], split: str) -> None:
    first, second = items
    assert first.question.triples == (("Lantern Guild", "seat", "Dunmarsh"), ("a", "r", "b"))
    assert (first.question.id, first.question.line, first.split) == ("WebQTrn-3_ab", 1, split)
    assert (first.question.topics, first.question.answers) == (("Lantern Guild",), ("Dunmarsh",))
    assert (first.group, first.extra) == ("WebQTrn-3", {"a_entity": ["Dunmarsh"]})
    assert (second.question.text, second.question.answers) == (ROG[1]["question"], ())


@pytest.mark.parametrize("name", ["train.jsonl", "x.train.jsonl.gz"])
def test_rog_json_lines(tmp_path: Path, name: str) -> None:
    path = _lines(tmp_path / name, ROG)
    source = open_source_questions(path)
    assert (source.layout, source.files) == ("rog", (path,))
    assert source.description.endswith("JSON lines")
    _check_rog(_read(path), "train")


def test_rog_parquet_in_the_folder_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("train")
    names = ["test-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"]
    for name, row in zip([*names, "validation-00000-of-00001"], [*ROG, *ROG], strict=True):
        # The same ids in two splits are two questions.
        _parquet(tmp_path / "data" / f"{name}.parquet", [row])
    source = open_source_questions(tmp_path)
    assert source.layout == "rog"
    assert "parquet" in source.description
    order = [(item.split, item.question.id[:9]) for item in source]
    assert order == [
        *(("train", "WebQTrn-4"), ("train", "WebQTrn-3")),
        *(("dev", "WebQTrn-4"), ("test", "WebQTrn-3")),
    ]
    source.check()
    [whole] = _read(tmp_path / "data" / f"{names[2]}.parquet")
    assert whole.question.triples == (("Lantern Guild", "seat", "Dunmarsh"), ("a", "r", "b"))


def test_parquet_of_a_folder_whose_name_is_a_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "a[1]*"
    folder.mkdir()
    plain = _parquet(tmp_path / "train.parquet", ROG)
    _check_rog(_read(plain.rename(folder / "train.parquet")), "train")


UGLY = [
    *("null", "NULL", "None", "", " a ", "a\tb", "a\nb\r", '"', "\\", '\\"', "\\u0000", "'", "{}"),
    *("e\u0301", "\u00e9", "\u2028", "\u200b", "\ufeffx", "\U0001f98a", "\x01\x1b[31m", "\u202e"),
    "n" * 1_000_000,
]


def test_names_are_byte_exact_in_parquet_and_json_lines(tmp_path: Path) -> None:
    graph = [[name, "r", UGLY[i - 1]] for i, name in enumerate(UGLY)]
    row = ROG[0] | {"graph": graph, "answer": UGLY, "question": UGLY[9], "q_entity": UGLY[:2]}
    path = tmp_path / "a.parquet"
    connection = duckdb.connect()
    columns = "question VARCHAR, graph VARCHAR[][], answer VARCHAR[], q_entity VARCHAR[]"
    connection.execute(f"CREATE TABLE t ({columns})")
    values = [row[key] for key in ("question", "graph", "answer", "q_entity")]
    connection.execute("INSERT INTO t VALUES (?, ?, ?, ?)", values)
    connection.execute(f"COPY t TO '{path}' (FORMAT parquet)")
    for source in (path, _lines(tmp_path / "a.jsonl", [row])):
        [item] = _read(source)
        assert item.question.triples == tuple(tuple(triple) for triple in graph)
        assert item.question.answers == tuple(name for name in UGLY if name.strip())
        assert (item.question.text, item.question.topics) == (UGLY[9], ("null", "NULL"))


def test_the_earlier_cut_keeps_the_first_triples_of_the_file(tmp_path: Path) -> None:
    graph = [[f"n{i % 40}", "r", f"n{i}"] for i in range(60)]
    graph[1] = graph[0]
    row = ROG[0] | {"graph": graph}
    for path in (_lines(tmp_path / "a.jsonl", [row]), _parquet(tmp_path / "a.parquet", [row])):
        [item] = _read(path, limit_triples=50)
        # Repeated ones are among the 50.
        assert item.question.triples == tuple(dict.fromkeys(tuple(t) for t in graph[:50]))


def test_arrow_and_hub_need_their_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data-00000-of-00001.arrow"
    path.write_bytes(b"\xff\xff\xff\xff" + bytes(100))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in (path, "hf:rmanluo/RoG-webqsp"):
        with pytest.raises(MissingInputError, match=r"pip install 'dragkit\[hub\]'"):
            list(open_source_questions(source))


def test_arrow(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(ROG)
    for name, writer in (("file", pyarrow.ipc.new_file), ("stream", pyarrow.ipc.new_stream)):
        path = tmp_path / f"train-{name}.arrow"
        with writer(str(path), table.schema) as file:
            file.write_table(table)
        _check_rog(_read(path), "train")


def test_hub_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, *, revision: str | None, streaming: bool) -> dict[str, list]:
        assert (name, revision, streaming) == ("rmanluo/RoG-webqsp", "abc", True)
        return {"validation": ROG, "other": ROG[:1]}

    errors = types.SimpleNamespace(DatasetsError=KeyError)
    module = types.SimpleNamespace(load_dataset=load_dataset, exceptions=errors)
    monkeypatch.setitem(sys.modules, "datasets", module)
    items = _read("hf:rmanluo/RoG-webqsp@abc")
    _check_rog(items[:2], "dev")
    assert [item.split for item in items] == ["dev", "dev", "other"]


def test_heuristics_are_passed_through(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "question": "q?",
            "triples": [["a", "r", "b"], ["b", "s", "c"]],
            "answers": "c",
            "paths": [[["a", "r", "b"], ["b", "s", "c"]]],
            "evidence": [["a", "r", "b"]],
            "relation_paths": [["r", "s"]],
            "group": 7,
            "dataset": "x",
        },
        {"question": "p?", "triples": [], "answer": ["a"], "topic_entities": ["t"], "id": 5},
    ]
    path = _lines(tmp_path / "my.dev.jsonl", rows)
    source = open_source_questions(path)
    items = list(source)
    assert source.layout == "heuristics"
    assert tuple(item.question for item in items) == read_questions(path).questions
    assert [(i.split, i.group, i.extra) for i in items] == [
        ("dev", "7", {"dataset": "x"}),
        ("dev", None, {}),
    ]


def test_real_heuristics_are_passed_through(kgqa_data: Path) -> None:
    path = kgqa_data / "webqsp.dev.jsonl.gz"
    items = _read(path)
    assert tuple(item.question for item in items) == read_questions(path).questions
    assert all(item.group and item.split == "dev" for item in items)


COLUMNS = {"question": "q", "answers": "a", "topics": "about", "group": "g", "split": "part"}


@pytest.mark.parametrize(("name", "quote"), [("t.tsv", ""), ("t.csv", '"'), ("t.txt", "")])
def test_tables_with_named_columns(tmp_path: Path, name: str, quote: str) -> None:
    delimiter = "," if name == "t.csv" else "\t"
    rows = [
        ["q", "a", "about", "g", "part", "note"],
        [f"who is {quote * 2}Ada{quote * 2}?", " x|y|x", "Ada", "g1", "train", "null"],
        ["NULL", "", "", "", "", ""],
    ]
    text = "\ufeff" + "\r\n".join(
        delimiter.join(f"{quote}{cell}{quote}" for cell in row) for row in rows
    )
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    first, second = _read(tmp_path / name, columns=COLUMNS)
    assert first.question.answers == (" x", "y", "x")
    assert first.question.topics == ("Ada",)
    assert (first.split, first.group, first.extra) == ("train", "g1", {"note": "null"})
    assert (second.question.text, second.question.answers) == ("NULL", ())
    assert (second.split, second.group) == (None, None)
    assert second.question.id == "t-3"


def test_numbered_columns_and_another_separator(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("7\twho?\ta; b\n8\twhere?\tc|d\n")
    columns = {"id": "1", "question": "2", "answers": "3"}
    found = _read(path, columns=columns, separator="; ")
    assert [(i.question.id, i.question.text, i.question.answers) for i in found] == [
        ("7", "who?", ("a", "b")),
        ("8", "where?", ("c|d",)),
    ]


def test_csv_cells_span_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('question,answers\n"two\nlines, ""quoted""",b\n\nlast,c\n')
    found = _read(path)
    assert [(i.question.line, i.question.text) for i in found] == [
        (2, 'two\nlines, "quoted"'),
        (5, "last"),
    ]


@given(
    st.lists(
        st.tuples(
            st.text(
                st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1
            ).filter(str.strip),
            st.lists(
                st.text(st.characters(exclude_characters="\0|", exclude_categories=["Cs"])).filter(
                    str.strip
                ),
                max_size=3,
                unique=True,
            ),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_json_lines_and_csv_round_trip(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, list[str]]]
) -> None:
    folder = tmp_path_factory.mktemp("round")
    lines = _lines(folder / "a.jsonl", [{"question": q, "answers": a} for q, a in rows])
    table = folder / "a.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(["question", "answers"])
        writer.writerows((q, "|".join(a)) for q, a in rows)
    for path in (lines, table):
        found = [(i.question.text, i.question.answers) for i in _read(path)]
        assert found == [(q, tuple(a)) for q, a in rows]


def test_metaqa_folder(tmp_path: Path) -> None:
    for hops, split, lines in (
        (1, "train", "who directed [[REC]]\tA|B\nwhat is [x]\ty\n"),
        (1, "test", "is [[a] b] it\tc|c\n"),
        (2, "dev", "who [p] q\tr"),
    ):
        folder = tmp_path / f"{hops}-hop" / "vanilla"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"qa_{split}.txt").write_text(lines)
    (tmp_path / "1-hop" / "qa_train_qtype.txt").write_text("movie_to_director\nt\n")
    (tmp_path / "kb.txt").write_text("a|r|b\n")
    source = open_source_questions(tmp_path)
    assert source.layout == "metaqa"
    found = [(i.question.id, i.question.text, i.question.topics, i.extra) for i in source]
    assert found == [
        ("metaqa-1-hop-train-1", "who directed [REC]", ("[REC]",), _kind("movie_to_director")),
        ("metaqa-1-hop-train-2", "what is x", ("x",), _kind("t")),
        ("metaqa-2-hop-dev-1", "who p q", ("p",), {"hops": 2}),
        ("metaqa-1-hop-test-1", "is [a] b it", ("[a] b",), {"hops": 1}),
    ]
    [last] = _read(tmp_path / "1-hop" / "vanilla" / "qa_test.txt")
    assert (last.question.answers, last.split) == (("c",), "test")


def _kind(name: str) -> dict[str, object]:
    return {"hops": 1, "qtype": name}


def test_a_table_of_questions_with_brackets_is_no_metaqa(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("question\tanswers\nwho is [a]\tb\n")
    assert open_source_questions(path).layout == "columns"
    assert [item.question.text for item in _read(path)] == ["who is [a]"]


def test_pathquestion(tmp_path: Path) -> None:
    path = tmp_path / "PQ-2H.txt"
    path.write_text(
        "sex of ann 's kid ?\tmale(male/female/)\tann#children#bob#gender#male#<end>#male\n"
        " sex of kid of ann ?\tmale(male/)\tann#children#bob#gender#male\n"
        "what of ann ?\tbo_(x)(bo_(x)/)\tann#knows#bo_(x)\n"
    )
    source = open_source_questions(path)
    first, second, third = source
    assert source.layout == "pathquestion"
    assert first.question.answers == ("male", "female")
    assert first.question.paths == second.question.paths == (("ann", "bob", "male"),)
    assert first.question.relation_paths == (("children", "gender"),)
    assert first.group == second.group != third.group
    assert (second.question.text, second.question.topics) == ("sex of kid of ann ?", ("ann",))
    assert (third.question.answers, third.extra) == (("bo_(x)",), {"hops": 1})


NSM = [
    {
        "id": "WebQTest-7",
        "question": "q?",
        "entities": [0],
        "answers": [{"kb_id": "m.2", "text": "Two"}, {"kb_id": None, "text": "1999"}],
        "subgraph": {"tuples": [[0, 1, 2], [2, 0, 1], [0, 1, 2]], "entities": [0, 1, 2]},
    }
]


def _nsm(folder: Path, rows: list[Any]) -> Path:
    (folder / "entities.txt").write_text("m.0\nm.1\nm.2\n")
    (folder / "relations.txt").write_text("r.a\nr.b")
    _lines(folder / "test_simple.json", rows)
    return folder


@pytest.mark.parametrize("names", ["", "entity_name.txt", "entities_names.json"])
def test_nsm(tmp_path: Path, names: str) -> None:
    _nsm(tmp_path, NSM)
    if names.endswith("txt"):
        (tmp_path / names).write_text("m.0\tZero\nm.1\tNone\nm.2\tZwei\n")
    elif names:
        (tmp_path / names).write_text('{"m.0": "Zero", "m.1": null, "m.2": "Zwei"}')
    source = open_source_questions(tmp_path)
    [item] = source
    assert (source.layout, item.split, item.group) == ("nsm", "test", "WebQTest-7")
    zero, two = ("Zero", "Zwei") if names else ("m.0", "m.2")
    assert item.question.topics == (zero,)
    assert item.question.answers == (two, "1999")
    assert item.question.triples == ((zero, "r.b", two), (two, "r.a", "m.1"))
    [by_id] = _read(tmp_path / "test_simple.json", entity_ids=True, limit_triples=1)
    assert by_id.question.triples == (("m.0", "r.b", "m.2"),)


def test_nsm_with_names_in_place_of_numbers(tmp_path: Path) -> None:
    row = NSM[0] | {"entities": ["m.5"], "subgraph": {"tuples": [["m.5", "r", "m.6"]]}}
    [item] = _read(_lines(tmp_path / "dev_simple.jsonl", [row]))
    assert item.question.triples == (("m.5", "r", "m.6"),)


WEBQSP = {
    "Version": "1.0",
    "FreebaseVersion": "x",
    "Questions": [
        {
            "QuestionId": "WebQTrn-0",
            "RawQuestion": "who?",
            "Parses": [
                {
                    "TopicEntityMid": "m.1",
                    "TopicEntityName": "Ada",
                    "InferentialChain": ["p.q", "r.s"],
                    "Answers": [
                        {"AnswerType": "Entity", "AnswerArgument": "m.2", "EntityName": "Ben"},
                        {"AnswerType": "Value", "AnswerArgument": "1999", "EntityName": None},
                    ],
                },
                {"TopicEntityMid": None, "InferentialChain": None, "Answers": []},
            ],
        },
        {"QuestionId": "WebQTrn-1", "RawQuestion": "none?", "Parses": []},
    ],
}


@pytest.mark.parametrize("indent", [None, 1])
def test_webqsp(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "WebQSP.train.json"
    path.write_text(json.dumps(WEBQSP, indent=indent))
    source = open_source_questions(tmp_path)
    first, second = source
    assert (source.layout, source.files) == ("webqsp", (path,))
    assert (first.question.topics, first.question.answers) == (("Ada",), ("Ben", "1999"))
    assert first.question.relation_paths == (("p.q", "r.s"),)
    assert (second.question.id, second.question.answers, second.split) == ("WebQTrn-1", (), "train")
    lines = path.read_text().splitlines()
    assert "{" in lines[second.question.line - 1]
    assert (second.question.line == 1) == (indent is None)
    by_id = _read(path, entity_ids=True)
    assert (by_id[0].question.topics, by_id[0].question.answers) == (("m.1",), ("m.2", "1999"))


def test_splits_and_groups_of_names() -> None:
    names = {
        "train-00000-of-00002.parquet": "train",
        "WebQSP.test.json": "test",
        "validation.jsonl.gz": "dev",
        "qa_dev.txt": "dev",
        "latest.jsonl": None,
        "train_test.jsonl": None,
        "TRAIN.tsv": "train",
    }
    assert {name: split_of_name(name) for name in names} == names
    ids = ["WebQTrn-12_a9", "WebQTest-3", "WebQTrn-12b", "x", ""]
    assert [group_of_id(name) for name in ids] == ["WebQTrn-12", "WebQTest-3", None, None, None]


def test_one_question_is_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read no further than the question that was asked for."""
    from dragkit.data.build import records

    path = _lines(tmp_path / "a.jsonl", [{"question": f"{i}"} for i in range(100)])
    source = open_source_questions(path)
    read: list[int] = []

    def counted(stream: Any, limit: int) -> Iterator[tuple[int, bytes | None]]:
        for number, line in numbered(stream, limit):
            read.append(number)
            yield number, line

    numbered = records.numbered_lines
    monkeypatch.setattr(records, "numbered_lines", counted)
    assert next(iter(source)).question.text == "0"
    assert read == [1]
