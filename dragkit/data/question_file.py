"""Reads files of questions: one question with its graph per JSON line, plain or gzip."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from dragkit.data.lines import BROKEN_GZIP, numbered_lines, open_source
from dragkit.errors import DataError

logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 64_000_000
_MAX_LISTED_PROBLEMS = 200
_BOM = b"\xef\xbb\xbf"

Triple = tuple[str, str, str]
# JSON path and reason of a problem.
Fault = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its graph.

    Attributes:
        id: unique in its file.
        text: the question.
        triples: distinct (head, relation, tail) names in file order.
        topics: entities that the question is about.
        paths: gold paths as entity names, topic first.
        answers: distinct gold answers.
        line: line number in the file, from 1.
        evidence: triples that others judged relevant. They may be outside `triples`.
        relation_paths: chains of relations. One that ends in "^-1" is walked from tail to head.
    """

    id: str
    text: str
    triples: tuple[Triple, ...]
    topics: tuple[str, ...]
    paths: tuple[tuple[str, ...], ...]
    answers: tuple[str, ...]
    line: int
    evidence: tuple[Triple, ...] = ()
    relation_paths: tuple[tuple[str, ...], ...] = ()


class Problem(NamedTuple):
    """A line that cannot be used: its number, the JSON path of the fault, and the reason."""

    line: int
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.line}: {self.path}: {self.reason}"


@dataclass(frozen=True, slots=True)
class QuestionFile:
    """Content of a file: usable questions, problems of the other lines, and counts by name."""

    questions: tuple[Question, ...]
    rejects: tuple[Problem, ...]
    notes: dict[str, int]


class _Row(msgspec.Struct):
    question: str
    triples: list[Triple]
    paths: list[list[str | Triple]] | None = None
    answer: str | list[str] | None = None
    answers: str | list[str] | None = None
    topic_entities: str | list[str] | None = None
    id: str | int | None = None
    evidence: list[Triple] | None = None
    relation_paths: list[tuple[str, ...]] | None = None


_ROW_DECODER = msgspec.json.Decoder(_Row)
_RAW_DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])


def _may_repeat_key(line: bytes) -> bool:
    """Whether a key may occur twice. The decoder would silently keep its last value."""
    # Outside the decoded values each key has two quotes. More quotes mean a second value, or an
    # escaped quote in a key. `_unique_keys` tells the two apart.
    values = _RAW_DECODER.decode(line)
    quotes = line.count(b'"') - sum(bytes(value).count(b'"') for value in values.values())
    return quotes != 2 * len(values)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {repeated!r} is given twice")
    return row


def _decode(line: bytes) -> _Row | Fault:
    """Returns the row, or its first fault."""
    try:
        # The decoder skips unknown keys without checking the encoding of their values.
        line.decode("utf-8")
        row = _ROW_DECODER.decode(line)
        if _may_repeat_key(line):
            json.loads(line, object_pairs_hook=_unique_keys)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `")
        reason = reason.replace("`array` of length 3", "a triple [head, relation, tail]")
        return path.rstrip("`") or "$", reason
    except msgspec.DecodeError as error:
        return "$", f"not valid JSON: {str(error).removeprefix('JSON is malformed: ')}"
    except UnicodeDecodeError as error:
        return "$", f"not UTF-8: {error.reason} (byte {error.start})"
    except RecursionError:
        return "$", "nested too deeply"
    except ValueError as error:
        return "$", str(error)
    for index, steps in enumerate(row.paths or ()):
        if len({type(step) for step in steps}) > 1:
            return f"$.paths[{index}]", "expected entities or triples, got both"
    # `\\u0000` is an escaped backslash and four zeros. Only an odd backslash escapes a NUL.
    if b"\\u0000" in line and b"\\u0000" in line.replace(rb"\\", b""):
        return "$", "a NUL character"
    return row


def _names(value: str | list[str] | None) -> tuple[str, ...]:
    """Returns the distinct non-empty names of a field that holds one, many or none."""
    names = [value] if isinstance(value, str) else value or ()
    return tuple(dict.fromkeys(name for name in names if name))


def _entity_paths(path: Sequence[str | Triple]) -> list[tuple[str, ...]]:
    """Returns a path as entity names. A path of triples is cut where they share no entity."""
    if not path or isinstance(path[0], str):
        return [tuple(path)] if path else []  # type: ignore[arg-type]
    paths: list[list[str]] = []
    for index, (head, _, tail) in enumerate(path):
        if paths and paths[-1][-1] in (head, tail):
            paths[-1].append(tail if paths[-1][-1] == head else head)
            continue
        # A first triple is walked from its tail if only its head occurs in the next triple.
        ends = path[index + 1][::2] if index + 1 < len(path) else ()
        is_inverse = head in ends and tail not in ends
        paths.append([tail, head] if is_inverse else [head, tail])
    return [tuple(names) for names in paths]


class QuestionReader:
    """Iterates over the usable questions of a file and collects the problems of the other lines.

    Args:
        path: JSONL, plain or gzip.
        max_line_bytes: a line of this length or longer is rejected.

    Attributes:
        rejects: problems so far, in line order.
        rows: number of non-empty lines so far.
        notes: counts so far, by name.
        unnamed: numbers of the lines whose question has a default id.
    """

    def __init__(self, path: str | Path, *, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self.path = Path(path)
        self.max_line_bytes = max_line_bytes
        self.rejects: list[Problem] = []
        self.rows = 0
        self.notes: Counter[str] = Counter()
        self.unnamed: set[int] = set()
        self._line_of_id: dict[str, int] = {}
        self._is_truncated = False

    def __iter__(self) -> Iterator[Question]:
        """Yields the usable questions in file order. Call `check` afterwards."""
        number = 0
        with open_source(self.path) as stream:
            try:
                for number, line in numbered_lines(stream, self.max_line_bytes):
                    if number == 1 and line is not None:
                        line = line.removeprefix(_BOM)
                    if line is not None and not line.strip():
                        self.notes["blank_lines"] += 1
                        continue
                    self.rows += 1
                    if (question := self._question(line, number)) is not None:
                        yield question
            except BROKEN_GZIP as error:
                self._is_truncated = True
                self._reject(number + 1, "$", f"the gzip data is truncated or damaged: {error}")

    def _reject(self, line: int, path: str, reason: str) -> None:
        self.rejects.append(Problem(line, path, reason))

    def _question(self, line: bytes | None, number: int) -> Question | None:
        if line is None:
            size = f"{self.max_line_bytes / 1e6:g} MB"
            self._reject(number, "$", f"the line is too long: {size} or more")
            return None
        row = _decode(line.rstrip(b"\r\n"))
        if isinstance(row, tuple):
            self._reject(number, *row)
            return None
        name = "" if row.id is None else str(row.id)
        if not name:
            self.unnamed.add(number)
            name = default_id(self.path, number)
        first = self._line_of_id.setdefault(name, number)
        if first != number:
            self._reject(number, "$.id", f"the same id as on line {first}")
            return None
        return self._to_question(row, name, number)

    def _to_question(self, row: _Row, name: str, number: int) -> Question:
        triples = tuple(dict.fromkeys(row.triples))
        paths = [p for path in row.paths or () for p in _entity_paths(path)]
        topics = _names(row.topic_entities)
        answers = _names(row.answer) or _names(row.answers)
        if not topics and paths:
            topics = tuple(dict.fromkeys(path[0] for path in paths))
            self.notes["topics_from_paths"] += 1
        self.notes["duplicate_triples"] += len(row.triples) - len(triples)
        for note, holds in (
            ("questions", True),
            ("empty_graph", not triples),
            ("empty_question", not row.question.strip()),
            ("no_answer", not answers),
            ("no_topic", not topics),
        ):
            self.notes[note] += holds
        return Question(
            name,
            row.question,
            triples,
            topics,
            tuple(paths),
            answers,
            number,
            evidence=tuple(row.evidence or ()),
            relation_paths=tuple(row.relation_paths or ()),
        )

    def check(self, max_bad_fraction: float = 0.0) -> None:
        """Raises if too many rows are unusable.

        Args:
            max_bad_fraction: fraction of the rows that may be unusable.

        Raises:
            DataError: it lists the first problems as `file:line: path: reason`, and their number.
        """
        if not self.rows and not self._is_truncated:
            raise DataError(f"{self.path}: holds no question. It needs one JSON object per line.")
        bad = len(self.rejects)
        if self._is_truncated or bad > max_bad_fraction * self.rows:
            messages = [f"{self.path}:{problem}" for problem in self.rejects[:_MAX_LISTED_PROBLEMS]]
            if bad > _MAX_LISTED_PROBLEMS:
                messages.append(f"... and {bad - _MAX_LISTED_PROBLEMS} more problems")
            summary = f"{self.path}: {bad} of {self.rows} rows cannot be used."
            if not self._is_truncated:
                summary += (
                    f" The accepted fraction is {max_bad_fraction:.4g}. Correct the rows, or raise "
                    "the fraction with --set data.max_bad_fraction=FRACTION."
                )
            raise DataError("\n".join([*messages, summary]))
        if count := self.notes["topics_from_paths"]:
            logger.warning(
                "%s: %d questions name no topic entity, so the first entity of each of their "
                "paths is used",
                self.path,
                count,
            )


def default_id(path: Path, line: int) -> str:
    """Returns the id of a question without one: file name without suffixes, and line number."""
    return f"{path.name.split('.')[0]}-{line}"


def read_questions(
    path: str | Path, *, max_bad_fraction: float = 0.0, max_line_bytes: int = MAX_LINE_BYTES
) -> QuestionFile:
    """Reads a whole file of questions in one pass.

    The keys of a row are `question` and `triples` (required), `paths`, `answer` or `answers`,
    `topic_entities`, `id`, `evidence` and `relation_paths`. Other keys are ignored. Questions
    without facts, answers or topics are kept and counted.

    Args:
        path: JSONL, plain or gzip.
        max_bad_fraction: fraction of the rows that may be unusable. They are left out and listed.
        max_line_bytes: a line of this length or longer is unusable.

    Returns:
        The questions, the problems of the rows left out, and counts.

    Raises:
        DataError: too many rows are unusable (lists them), gzip data is truncated, or the file has
            no row.
        MissingInputError: the file does not exist or cannot be read.
    """
    reader = QuestionReader(path, max_line_bytes=max_line_bytes)
    questions = tuple(reader)
    reader.check(max_bad_fraction)
    return QuestionFile(questions, tuple(reader.rejects), dict(reader.notes))
