"""Unusable rows: one pass reports each with its line, the JSON path and the reason."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dragkit.data.question_file import read_questions
from dragkit.data.question_row import Fault, decode_row
from dragkit.errors import DataError

GOOD = b'{"id":"%d","question":"q","triples":[["a","r","b"]],"answer":"b"}'

# Line, JSON path of the fault, and words of the reason.
KINDS = [
    (b'{"question":"q","triples":[["a","r"', "$", "not valid JSON: Input data was truncated"),
    (b'{"question":"q","triples":[]} {}', "$", "not valid JSON: trailing characters"),
    (b'{"triples":[]} {}', "$", "not valid JSON: trailing characters"),
    (b'["question"]', "$", "Expected `object`, got `array`"),
    (b'{"question":"q"}', "$", "missing required field `triples`"),
    (b'{"question":5,"triples":[]}', "$.question", "Expected `str`, got `int`"),
    (b'{"question":"q","triples":[["a","r","b"],["a","b"]]}', "$.triples[1]", "[head, relation"),
    (b'{"question":"q","triples":[["a","r","b","c"]]}', "$.triples[0]", "[head, relation, tail]"),
    (b'{"question":"q","triples":[["a","r",null]]}', "$.triples[0][2]", "got `null`"),
    (b'{"question":"q","triples":[],"paths":[["a",["a","r","b"]]]}', "$.paths[0]", "got both"),
    (b'{"question":"q","triples":[],"evidence":[["a","r"]]}', "$.evidence[0]", "a triple [head"),
    (b'{"question":"q","triples":[],"evidence":"a"}', "$.evidence", "Expected `array | null`"),
    (b'{"question":"q","triples":[],"relation_paths":["r"]}', "$.relation_paths[0]", "got `str`"),
    (b'{"question":"q","triples":[],"relation_paths":[[1]]}', "$.relation_paths[0][0]", "`int`"),
    (b'{"question":"q","triples":[],"answer":[1]}', "$.answer[0]", "got `int`"),
    (b'{"question":"q","triples":[[NaN,"r","b"]]}', "$", "not valid JSON"),
    (b'{"question":"\\ud83d!","triples":[]}', "$", "surrogate"),
    (b'{"question":"q","triples":[["a","r\xff","b"]]}', "$", "not UTF-8"),
    (b'{"question":"q","triples":[],"x":"\xff"}', "$", "not UTF-8"),
    (b'{"question":"q\\u0000","triples":[]}', "$", "NUL"),
    (b'{"question":"q\\\\\\u0000","triples":[]}', "$", "NUL"),
    (b'{"question":"q\x00","triples":[]}', "$", "not valid JSON"),
    (b'{"question":"q","triples":[],"question":"r"}', "$", "the key 'question' is given twice"),
    (b'{"question":"q","triples":[],"\\u0071uestion":"r"}', "$", "given twice"),
    (b'{"question":"q","triples":[],"a\\u001b":1,"a\\u001b":2}', "$", r"'a\x1b' is given twice"),
    (b'\xef\xbb\xbf{"question":"q","triples":[]}', "$", "not valid JSON"),
    (b'{"id":"0","question":"q","triples":[]}', "$.id", "same id as on line 1"),
    (b'{"question":"' + b"x" * 5000 + b'","triples":[]}', "$", "too long"),
]
# Longer than the line limit of the test with all kinds.
DEEP = b'{"question":"q","triples":[],"x":' + b"[" * 99_999 + b"]" * 99_999 + b"}"


def test_every_bad_line_of_a_large_file(tmp_path: Path) -> None:
    """All of 140 bad lines among 10,000 are reported, and no other, within seconds."""
    draw = random.Random(3)
    bad_lines = sorted(draw.sample(range(1, 10_000), 140))
    expected = {}
    lines = [GOOD % number for number in range(10_000)]
    for index, line in enumerate(bad_lines):
        lines[line], path, reason = KINDS[index % len(KINDS)]
        expected[line + 1] = (path, reason)
    large = tmp_path / "large.jsonl"
    large.write_bytes(b"\n".join(lines) + b"\n")
    started = time.process_time()
    file = read_questions(large, max_bad_fraction=0.014, max_line_bytes=4000)
    assert time.process_time() - started < 3
    assert len(file.questions) == 10_000 - 140
    assert {problem.line: problem.path for problem in file.rejects} == {
        line: path for line, (path, _) in expected.items()
    }
    for problem in file.rejects:
        assert expected[problem.line][1] in problem.reason, problem
    with pytest.raises(DataError) as error:
        read_questions(large, max_bad_fraction=0.0139, max_line_bytes=4000)
    assert error.value.exit_code == 65
    *listed, last = str(error.value).splitlines()
    assert [line.split(": ")[:2] for line in listed] == [
        [f"{large}:{line}", path] for line, (path, _) in expected.items()
    ]
    assert "140 of 10000 rows" in last


def test_deep_nesting_is_refused_and_an_escaped_backslash_before_u0000_is_not() -> None:
    assert decode_row(DEEP) == ("$", "nested too deeply")
    decoded = decode_row(b'{"question":"\\\\u0000","triples":[]}')
    assert decoded[0].question == "\\u0000"


def test_all_of_many_bad_lines_are_listed(write_rows: Callable[..., Path]) -> None:
    path = write_rows([b"[]"] * 1000)
    with pytest.raises(DataError) as error:
        read_questions(path)
    *lines, last = str(error.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{n}" for n in range(1, 1001)]
    assert "1000 of 1000 rows" in last


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        (b'{"question":"q","graph":[]}', "`triples`. It holds `graph`"),
        (b'{"Question":"q","triples":[]}', "`question`. It holds `Question`"),
        (b'{"question":"q","hops":2}', "`triples`"),
    ],
)
def test_a_missing_key_is_named_with_the_one_like_it(row: bytes, hint: str) -> None:
    fault = decode_row(row)
    assert isinstance(fault, Fault)
    assert hint in fault.reason and ("It holds" in fault.reason) == ("It holds" in hint)


def test_a_line_at_the_limit(tmp_path: Path) -> None:
    row = b'{"question":"%s","triples":[]}'
    limit = 100 - len(row) + 2
    for size, end, bad in (
        (limit - 1, b"", 0),
        (limit - 1, b"\n", 0),
        (limit, b"", 1),
        (limit, b"\n", 1),
    ):
        path = tmp_path / "limit.jsonl"
        path.write_bytes(b'{"question":"first","triples":[]}\n' + row % (b"x" * size) + end)
        file = read_questions(path, max_bad_fraction=0.5, max_line_bytes=100)
        assert [problem.line for problem in file.rejects] == [2] * bad, (size, end)


def test_a_line_of_64_mb_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_bytes(GOOD % 1 + b"\n" + b"x" * 64_000_000 + b"\n" + GOOD % 3)
    file = read_questions(path, max_bad_fraction=0.5)
    assert [(problem.line, problem.path) for problem in file.rejects] == [(2, "$")]
    assert [question.line for question in file.questions] == [1, 3]


def _slow_parse(line: bytes) -> dict | None:
    """Parses a row with the json module. Returns None for a row that must be refused."""

    def unique_keys(pairs: list) -> dict:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("repeated key")
        return dict(pairs)

    def no_constant(literal: str) -> None:
        raise ValueError(literal)

    try:
        row = json.loads(line.decode(), object_pairs_hook=unique_keys, parse_constant=no_constant)
        json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    is_valid = (
        isinstance(row, dict)
        and isinstance(row.get("question"), str)
        and isinstance(row.get("triples"), list)
        and all(
            isinstance(t, list) and len(t) == 3 and all(isinstance(x, str) for x in t)
            for t in row["triples"]
        )
    )
    return row if is_valid and "\\u0000" not in json.dumps(row) else None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_mutated_rows_are_read_as_a_slow_parser_reads_them(data: st.DataObject) -> None:
    """After byte changes both parsers return the same row or refuse it. Nothing else is raised."""
    line = bytearray(
        '{"question":"wé\\u00e9?","triples":[["a","r","b"],["ü","s","a"]],"x":[1,{}]}'.encode()
    )
    for _ in range(data.draw(st.integers(1, 4))):
        index = data.draw(st.integers(0, len(line) - 1))
        new = data.draw(
            st.sampled_from([b"", b'"', b"\\", b"{", b"]", b",", b"\xff", b"\x00", b"N", b"0"])
        )
        line[index : index + data.draw(st.integers(0, 2))] = new
    decoded, slow = decode_row(bytes(line)), _slow_parse(bytes(line))
    assert isinstance(decoded, Fault) == (slow is None), decoded
    if slow is not None:
        assert decoded.row.question == slow["question"]
        assert [list(triple) for triple in decoded.row.triples] == slow["triples"]
        assert set(decoded.unread) == set(slow) - {"question", "triples"}
