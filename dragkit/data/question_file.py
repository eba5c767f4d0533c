"""Reads files of questions: one question with its graph per JSON line, plain or gzip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dragkit.data.lines import BROKEN_GZIP, numbered_lines, open_source
from dragkit.data.question_row import (
    Fault,
    Row,
    Triple,
    decode_row,
    distinct_names,
    entity_paths,
    near_field,
)
from dragkit.errors import DataError

MAX_LINE_BYTES = 64_000_000
# Distinct unread keys that are counted. A file of generated keys would fill the memory.
MAX_UNREAD_KEYS = 1000
_BOM = b"\xef\xbb\xbf"


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
        group: questions of one group belong into one split. It is empty if the file gives none.
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
    group: str = ""


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


class QuestionReader:
    """Iterates over the usable questions of a file and collects the problems of the other lines.

    Args:
        path: JSONL, plain or gzip.
        max_line_bytes: a line of this length or longer is rejected.
        max_unread_keys: distinct keys that `unread` holds at most.

    Attributes:
        rejects: problems so far, in line order.
        rows: number of non-empty lines so far.
        notes: counts so far, by name.
        unnamed: numbers of the lines whose question has a default id.
        line_of_id: lines of the given ids. A default id may be among them, see `default_id`.
        unread: number of questions by (key, field): the key is not read, and the question lacks
            the field that it seems to mean. The field "" marks a key like none, where the question
            has no answer.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        max_line_bytes: int = MAX_LINE_BYTES,
        max_unread_keys: int = MAX_UNREAD_KEYS,
    ) -> None:
        self.path = Path(path)
        self.max_line_bytes, self.max_unread_keys = max_line_bytes, max_unread_keys
        self.rejects: list[Problem] = []
        self.rows = 0
        self.notes: Counter[str] = Counter()
        self.unnamed: set[int] = set()
        self.line_of_id: dict[str, int] = {}
        self.unread: Counter[tuple[str, str]] = Counter()
        self._is_truncated = False

    def __iter__(self) -> Iterator[Question]:
        """Yields the usable questions in file order. Call `check` afterwards."""
        with open_source(self.path) as stream:
            yield from self.read(stream)

    def read(self, stream: BinaryIO, first_line: int = 1) -> Iterator[Question]:
        """Yields the usable questions of a part of the file whose first line has this number."""
        number = first_line - 1
        try:
            for number, line in numbered_lines(stream, self.max_line_bytes, first_line):
                if number == 1 and line is not None:
                    line = line.removeprefix(_BOM)
                if line is not None and not line.strip():
                    self.notes["blank_lines"] += 1
                    continue
                self.rows += 1
                if (question := self._question(line, number)) is not None:
                    yield question
        except BROKEN_GZIP as error:
            self.truncate(number, error)

    def truncate(self, last_line: int, error: Exception) -> None:
        """Notes that the gzip data breaks off after a line."""
        self._is_truncated = True
        self._reject(last_line + 1, "$", f"the gzip data is truncated or damaged: {error}")

    def _reject(self, line: int, path: str, reason: str) -> None:
        self.rejects.append(Problem(line, path, reason))

    def _question(self, line: bytes | None, number: int) -> Question | None:
        if line is None:
            size = f"{self.max_line_bytes / 1e6:g} MB"
            self._reject(number, "$", f"the line is too long: {size} or more")
            return None
        decoded = decode_row(line.rstrip(b"\r\n"))
        if isinstance(decoded, Fault):
            self._reject(number, *decoded)
            return None
        row = decoded.row
        name = "" if row.id is None else str(row.id)
        if not name:
            self.unnamed.add(number)
            name = default_id(self.path, number)
        elif (first := self.line_of_id.setdefault(name, number)) != number:
            self._reject(number, "$.id", f"the same id as on line {first}")
            return None
        question = self._to_question(row, name, number)
        self._count_unread(decoded.unread, row, question)
        return question

    def _count_unread(self, keys: tuple[str, ...], row: Row, question: Question) -> None:
        """Counts the unread keys that may hold what this question lacks."""
        for key in keys:
            field = near_field(key)
            if field in ("answer", "answers", None):
                lacks, field = not question.answers, field and "answer"
            elif field == "topic_entities":
                lacks = not question.topics
            else:
                lacks = not getattr(row, field)
            entry = (key, field or "")
            if lacks and (entry in self.unread or len(self.unread) < self.max_unread_keys):
                self.unread[entry] += 1

    def _to_question(self, row: Row, name: str, number: int) -> Question:
        question = question_of(row, name, number)
        self.notes["topics_from_paths"] += bool(
            question.topics and not distinct_names(row.topic_entities)
        )
        self.notes["duplicate_triples"] += len(row.triples) - len(question.triples)
        other_answers = set(distinct_names(row.answers)) - set(question.answers)
        self.notes["blank_names"] += sum(
            not all(map(str.strip, triple)) for triple in question.triples
        )
        for note, holds in (
            ("questions", True),
            ("empty_graph", not question.triples),
            ("empty_question", not row.question.strip()),
            ("no_answer", not question.answers),
            ("no_topic", not question.topics),
            ("other_answers", other_answers),
        ):
            self.notes[note] += bool(holds)
        return question

    def check(self, max_bad_fraction: float = 0.0) -> None:
        """Raises if too many rows are unusable.

        Args:
            max_bad_fraction: fraction of the rows that may be unusable.

        Raises:
            DataError: it lists all problems as `file:line: path: reason`, and their number.
        """
        if not self.rows and not self._is_truncated:
            raise DataError(f"{self.path}: holds no question. It needs one JSON object per line.")
        bad = len(self.rejects)
        if self._is_truncated or bad > max_bad_fraction * self.rows:
            messages = [f"{self.path}:{problem}" for problem in self.rejects]
            summary = f"{self.path}: {bad} of {self.rows} rows cannot be used."
            if not self._is_truncated:
                summary += (
                    f" The accepted fraction is {max_bad_fraction:.4g}. Correct the rows, or raise "
                    "the fraction with --set data.max_bad_fraction=FRACTION."
                )
            raise DataError("\n".join([*messages, summary]))


def question_of(row: Row, name: str, number: int) -> Question:
    """Returns the question of a row, with the given id and line number."""
    paths = [p for path in row.paths or () for p in entity_paths(path)]
    topics = distinct_names(row.topic_entities) or dict.fromkeys(path[0] for path in paths)
    return Question(
        name,
        row.question,
        tuple(dict.fromkeys(row.triples)),
        tuple(topics),
        tuple(paths),
        distinct_names(row.answer) or distinct_names(row.answers),
        number,
        evidence=tuple(row.evidence or ()),
        relation_paths=tuple(row.relation_paths or ()),
        group="" if row.group is None else str(row.group),
    )


def default_id(path: Path, line: int, given: Container[str] = ()) -> str:
    """Returns the id of a question without one: file name without suffixes, and line number.

    A prime follows while another question of the file has this as its own id. So whether a file is
    accepted does not depend on its name.

    Args:
        path, line: the file and the line number.
        given: ids of the questions that have one.
    """
    name = f"{path.name.split('.')[0]}-{line}"
    while name in given:
        name += "'"
    return name


def read_questions(
    path: str | Path, *, max_bad_fraction: float = 0.0, max_line_bytes: int = MAX_LINE_BYTES
) -> QuestionFile:
    """Reads a whole file of questions in one pass.

    The keys of a row are `question` and `triples` (required), `paths`, `answer` or `answers`,
    `topic_entities`, `id`, `evidence`, `relation_paths` and `group`. Other keys are ignored.
    Questions without facts, answers or topics are kept and counted.

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
    given = reader.line_of_id
    questions = tuple(
        replace(question, id=default_id(reader.path, question.line, given))
        if question.line in reader.unnamed and question.id in given
        else question
        for question in questions
    )
    return QuestionFile(questions, tuple(reader.rejects), dict(reader.notes))
