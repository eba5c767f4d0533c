"""Files of questions with unusable lines: each is found, and no other."""

from __future__ import annotations

import random
from pathlib import Path

from dragkit.data.question_file import read_questions
from dragkit.errors import DataError
from dragkit.selftest.outcome import Outcome, require

_GOOD = b'{"id":"%d","question":"q","triples":[["a","r","b"]],"answer":"b"}'
_MAX_LINE_BYTES = 4000
# Kind, line, JSON path of the fault.
BAD_LINES: tuple[tuple[str, bytes, str], ...] = (
    ("cut short", b'{"question":"q","triples":[["a","r"', "$"),
    ("two objects", b'{"question":"q","triples":[]} {}', "$"),
    ("an array", b'["question"]', "$"),
    ("a missing key", b'{"question":"q"}', "$"),
    ("a wrong type", b'{"question":5,"triples":[]}', "$.question"),
    ("a pair", b'{"question":"q","triples":[["a","r","b"],["a","b"]]}', "$.triples[1]"),
    ("four parts", b'{"question":"q","triples":[["a","r","b","c"]]}', "$.triples[0]"),
    ("null as entity", b'{"question":"q","triples":[["a","r",null]]}', "$.triples[0][2]"),
    ("NaN", b'{"question":"q","triples":[[NaN,"r","b"]]}', "$"),
    ("half a surrogate", b'{"question":"\\ud83d!","triples":[]}', "$"),
    ("not UTF-8", b'{"question":"q","triples":[["a","r\xff","b"]]}', "$"),
    ("NUL", b'{"question":"q\\u0000","triples":[]}', "$"),
    ("a key twice", b'{"question":"q","triples":[],"question":"r"}', "$"),
    ("too long", b'{"question":"' + b"x" * 5000 + b'","triples":[]}', "$"),
    ("a byte order mark", b'\xef\xbb\xbf{"question":"q","triples":[]}', "$"),
    ("an id twice", b'{"id":"0","question":"q","triples":[]}', "$.id"),
    ("a number as path", b'{"question":"q","triples":[],"paths":[[1]]}', "$.paths[0][0]"),
)


def bad_lines(outcome: Outcome, root: Path, *, corruptions: int, long_line: int) -> None:
    """Finds 140 bad lines of every kind among 10,000, then counts the rows of corrupted files.

    Args:
        outcome: counts the cases.
        root: folder of the files.
        corruptions: number of files with random bytes in them.
        long_line: bytes of a line that the usual limit refuses. 0 makes none.
    """
    path = root / "lines.jsonl"
    draw = random.Random(3)
    lines = [_GOOD % number for number in range(10_000)]
    expected = {}
    for index, number in enumerate(sorted(draw.sample(range(1, len(lines)), 140))):
        kind, lines[number], place = BAD_LINES[index % len(BAD_LINES)]
        expected[number + 1] = (kind, place)
    path.write_bytes(b"\n".join(lines) + b"\n")
    file = read_questions(path, max_bad_fraction=0.014, max_line_bytes=_MAX_LINE_BYTES)
    found = {problem.line: problem.path for problem in file.rejects}
    for number, (kind, place) in expected.items():
        with outcome.case(f"line {number}, {kind}"):
            require(found.get(number) == place, f"reported as {found.get(number)}, not {place}")
    with outcome.case("the good lines"):
        require(len(file.questions) == len(lines) - len(expected), "some were refused")
    with outcome.case("the limit of bad lines"):
        try:
            read_questions(path, max_bad_fraction=0.0139, max_line_bytes=_MAX_LINE_BYTES)
        except DataError as error:
            require(f"{path}:{max(expected)}:" in str(error), "the last bad line is not named")
        else:
            require(False, "more bad lines than are accepted were read")
    with outcome.case("a line beyond the usual limit", tries=int(bool(long_line))):
        path.write_bytes(_GOOD % 1 + b"\n" + b"x" * long_line + b"\n" + _GOOD % 2)
        found = read_questions(path, max_bad_fraction=0.5).rejects
        lines = [problem.line for problem in found]
        require(lines == [2] * bool(long_line), f"reported on lines {lines}")
    for seed in range(corruptions):
        with outcome.case(f"corruption {seed}"):
            _require_all_rows_counted(path, random.Random(seed))
    outcome.notes.append(f"{len(BAD_LINES)} kinds of bad lines, {corruptions} corrupted files")


def _require_all_rows_counted(path: Path, draw: random.Random) -> None:
    """Every row of a file with random bytes is either used or reported, once."""
    data = bytearray(b"\n".join(_GOOD % number for number in range(30)))
    for _ in range(draw.randint(1, 20)):
        data[draw.randrange(len(data))] = draw.choice(b'"\\{]},:\xff\x00N0\n')
    path.write_bytes(data)
    rows = {n for n, line in enumerate(data.split(b"\n"), 1) if line.strip()}
    file = read_questions(path, max_bad_fraction=1.0)
    used = [question.line for question in file.questions]
    seen = sorted(used + [problem.line for problem in file.rejects])
    require(seen == sorted(rows), f"of {len(rows)} rows {len(seen)} were counted")
