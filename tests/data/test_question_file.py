"""Reading files of questions: accepted rows, gzip and missing files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dragkit.data.question_file import read_questions
from dragkit.errors import DataError, MissingInputError

ROW = {"question": "q?", "triples": [["a", "r", "b"]], "answer": "b"}


def test_the_tiny_fixture(tiny_file: Path) -> None:
    file = read_questions(tiny_file)
    by_id = {question.id: question for question in file.questions}
    assert list(by_id) == [
        "tiny-unicode",
        "tiny-parallel",
        "tiny-empty-graph",
        "tiny-no-answer",
        "tiny-lone-answer",
        "heuristics_tiny-6",
        "tiny-self-loop",
        "tiny-duplicates",
    ]
    assert file.rejects == ()
    assert [question.line for question in file.questions] == list(range(1, 9))
    assert by_id["tiny-lone-answer"].answers == ("Fenn Valley",)
    assert by_id["tiny-no-answer"].answers == ()
    assert by_id["tiny-empty-graph"].triples == ()
    assert by_id["heuristics_tiny-6"].topics == ("Pim Oster",)
    assert by_id["tiny-duplicates"].answers == ("smoke leaf", "pale needle")
    assert len(by_id["tiny-duplicates"].triples) == 5
    # Names are not normalised: composed and decomposed spellings are two entities.
    names = {name for h, _, t in by_id["tiny-unicode"].triples for name in (h, t)}
    assert {"Cafe\u0301 Anouk", "Caf\u00e9 Anouk", "null", "NaN"} <= names
    assert file.notes == {
        "questions": 8,
        "empty_graph": 1,
        "empty_question": 0,
        "no_answer": 1,
        "no_topic": 0,
        "duplicate_triples": 2,
        "topics_from_paths": 1,
        "other_answers": 0,
        "blank_names": 0,
    }


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ([["a", "b", "c"]], (("a", "b", "c"),)),
        ([[["a", "r", "b"], ["b", "s", "c"]]], (("a", "b", "c"),)),
        ([[["b", "r", "a"], ["b", "s", "c"], ["d", "t", "c"]]], (("a", "b", "c", "d"),)),
        ([[["a", "r", "b"]]], (("a", "b"),)),
        ([[["a", "r", "b"], ["x", "r", "y"]]], (("a", "b"), ("x", "y"))),
        ([[["a", "r", "a"], ["a", "r", "b"]]], (("a", "a", "b"),)),
        ([[]], ()),
        (None, ()),
    ],
)
def test_paths_as_names_or_triples(
    paths: list | None, expected: tuple, write_rows: Callable[..., Path]
) -> None:
    (question,) = read_questions(write_rows([ROW | {"paths": paths}])).questions
    assert question.paths == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"answer": "x"}, ("x",)),
        ({"answer": ["x", "y", "x"]}, ("x", "y")),
        ({"answer": ""}, ()),
        ({"answer": [" ", "\n", "\u3000", " x"]}, (" x",)),
        ({"answer": " ", "answers": ["z"]}, ("z",)),
        ({"answer": None}, ()),
        ({"answer": None, "answers": ["z"]}, ("z",)),
        ({"answer": ["x"], "answers": ["z"]}, ("x",)),
    ],
)
def test_answers(fields: dict, expected: tuple, write_rows: Callable[..., Path]) -> None:
    (question,) = read_questions(write_rows([ROW | fields])).questions
    assert question.answers == expected


def test_bom_blank_lines_and_unknown_keys_are_accepted(tmp_path: Path) -> None:
    lines = [
        b"\xef\xbb\xbf" + json.dumps(ROW | {"id": 7}).encode(),
        b"",
        json.dumps(ROW | {"hops": {"deep": [1, None]}, 'odd"key': 1}).encode() + b"\r",
        b"   ",
        # A key inside a string and a zero-width character are valid.
        json.dumps(ROW | {"question": '"question": "answer"\ufeff'}, ensure_ascii=False).encode(),
    ]
    path = tmp_path / "mixed.train.jsonl"
    path.write_bytes(b"\n".join(lines))
    file = read_questions(path)
    assert [question.id for question in file.questions] == ["7", "mixed-3", "mixed-5"]
    assert file.questions[2].text == '"question": "answer"\ufeff'
    assert file.notes["blank_lines"] == 2


def test_names_round_trip(write_rows: Callable[..., Path]) -> None:
    names = [
        "\u202eabc",
        "👩‍👩‍👧‍👦",
        "a\u200bb",
        "é",
        "e\u0301",
        "null",
        "None",
        "\x1b[31m",
        "n" * 10**6,
    ]
    rows = [ROW | {"triples": [[name, "r", name + "!"] for name in names]}]
    (question,) = read_questions(write_rows(rows)).questions
    assert [head for head, _, _ in question.triples] == names


@pytest.mark.parametrize(
    ("value", "group"), [("g", "g"), (7, "7"), ("7", "7"), ("", ""), (None, ""), (" g", " g")]
)
def test_groups(value: object, group: str, write_rows: Callable[..., Path]) -> None:
    row = {"question": "q", "triples": [], "group": value}
    (question,) = read_questions(write_rows([row])).questions
    assert question.group == group
    with pytest.raises(DataError, match=r"\$.group: Expected `int \| str \| null`, got `array`"):
        read_questions(write_rows([row | {"group": [value]}]))


def test_gzip_reads_the_same(tmp_path: Path, tiny_file: Path) -> None:
    packed = tmp_path / "heuristics_tiny.jsonl.gz"
    packed.write_bytes(gzip.compress(tiny_file.read_bytes()))
    assert read_questions(packed) == read_questions(tiny_file)


def test_truncated_and_damaged_gzip_is_always_refused(tmp_path: Path) -> None:
    data = gzip.compress(b"\n".join(json.dumps(ROW).encode() for _ in range(2000)))
    damaged = bytearray(data)
    damaged[-6] ^= 0xFF
    path = tmp_path / "truncated.jsonl.gz"
    for content in (*(data[:size] for size in (0, 1, 5, len(data) // 2, len(data) - 1)), damaged):
        path.write_bytes(content)
        with pytest.raises(DataError, match="gzip"):
            read_questions(path, max_bad_fraction=0.9)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(
        MissingInputError, match=r"trian\.jsonl: no such file.*train\.jsonl"
    ) as error:
        read_questions(tmp_path / "trian.jsonl")
    assert error.value.exit_code == 66
    with pytest.raises(MissingInputError, match="does not exist either"):
        read_questions(tmp_path / "nowhere" / "train.jsonl")
    with pytest.raises(MissingInputError, match="a folder, not a file"):
        read_questions(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_rows(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="holds no question"):
        read_questions(path)
