"""Reads heuristics files: one question with its subgraph per JSON line, plain or gzip."""

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
_LISTED_PROBLEMS = 200
_BOM = b"\xef\xbb\xbf"

Triple = tuple[str, str, str]
# JSON path and reason.
Fault = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its subgraph.

    Attributes:
        id: unique in its file; text: the question.
        triples: (head, relation, tail) names, each once, in file order.
        topics: entities the question is about.
        paths: gold paths as entity names, topic first.
        answers: gold answers, each once.
        line: of the file, from 1.
    """

    id: str
    text: str
    triples: tuple[Triple, ...]
    topics: tuple[str, ...]
    paths: tuple[tuple[str, ...], ...]
    answers: tuple[str, ...]
    line: int


class Problem(NamedTuple):
    """Why a line cannot be used: its number, the JSON path of the fault, the reason."""

    line: int
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.line}: {self.path}: {self.reason}"


@dataclass(frozen=True, slots=True)
class QuestionFile:
    """The questions of a file, the problems of the lines left out, and counts worth knowing."""

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


_ROW = msgspec.json.Decoder(_Row)
_SHALLOW = msgspec.json.Decoder(dict[str, msgspec.Raw])


def _repeats_a_key(line: bytes) -> bool:
    """Whether a key may be given twice, of which the decoder keeps the last value.

    Outside the kept values there are two quotes for each key. More mean a second value, or an
    escaped quote in a key, which `_unique` lets through.
    """
    kept = _SHALLOW.decode(line)
    quotes = line.count(b'"') - sum(bytes(value).count(b'"') for value in kept.values())
    return quotes != 2 * len(kept)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {repeated!r} is given twice")
    return found


def _decode(line: bytes) -> _Row | Fault:
    """The row, or its first fault."""
    try:
        # The decoder skips the content of unknown keys without looking at its encoding.
        line.decode("utf-8")
        row = _ROW.decode(line)
        if _repeats_a_key(line):
            json.loads(line, object_pairs_hook=_unique)
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
    for place, steps in enumerate(row.paths or ()):
        if len({type(step) for step in steps}) > 1:
            return f"$.paths[{place}]", "expected entities or triples, got both"
    # Without the escaped backslashes, what is left of this text is an escaped NUL.
    if b"\\u0000" in line and b"\\u0000" in line.replace(rb"\\", b""):
        return "$", "a NUL character"
    return row


def _names(value: str | list[str] | None) -> tuple[str, ...]:
    """Distinct non-empty names of a field that holds one, many or none."""
    if value is None:
        return ()
    return tuple(
        dict.fromkeys(name for name in ([value] if isinstance(value, str) else value) if name)
    )


def _entity_paths(path: Sequence[str | Triple]) -> list[tuple[str, ...]]:
    """A path as entity names. Triples are followed, and the path is cut where they do not join."""
    if not path or isinstance(path[0], str):
        return [tuple(path)] if path else []  # type: ignore[arg-type]
    found: list[list[str]] = []
    for place, (head, _, tail) in enumerate(path):
        if found and found[-1][-1] in (head, tail):
            found[-1].append(tail if found[-1][-1] == head else head)
            continue
        following = path[place + 1] if place + 1 < len(path) else None
        turned = following is not None and tail not in following[::2] and head in following[::2]
        found.append([tail, head] if turned else [head, tail])
    return [tuple(names) for names in found]


class QuestionReader:
    """Streams the usable questions of a file and collects what is wrong with the others.

    Args:
        path: JSONL, plain or gzip.
        max_line_bytes: a line this long or longer is rejected.

    Attributes:
        rejects: problems so far, in line order; rows: non-empty lines so far.
        notes: counts so far; unnamed: lines whose id was made up from file name and line.
    """

    def __init__(self, path: str | Path, *, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self.path = Path(path)
        self.max_line_bytes = max_line_bytes
        self.rejects: list[Problem] = []
        self.rows = 0
        self.notes: Counter[str] = Counter()
        self.unnamed: set[int] = set()
        self._lines_of_ids: dict[str, int] = {}
        self._cut_short = False

    def __iter__(self) -> Iterator[Question]:
        """The usable questions in file order. Call `check` afterwards."""
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
                self._cut_short = True
                self._reject(number + 1, "$", f"the gzip data is cut short or damaged: {error}")

    def _reject(self, line: int, path: str, reason: str) -> None:
        self.rejects.append(Problem(line, path, reason))

    def _question(self, line: bytes | None, number: int) -> Question | None:
        if line is None:
            size = f"{self.max_line_bytes / 1e6:g} MB"
            self._reject(number, "$", f"the line is over-long: {size} or more")
            return None
        row = _decode(line.rstrip(b"\r\n"))
        if isinstance(row, tuple):
            self._reject(number, *row)
            return None
        name = "" if row.id is None else str(row.id)
        if not name:
            self.unnamed.add(number)
            name = default_id(self.path, number)
        first = self._lines_of_ids.setdefault(name, number)
        if first != number:
            self._reject(number, "$.id", f"the same id as on line {first}")
            return None
        return self._count(row, name, number)

    def _count(self, row: _Row, name: str, number: int) -> Question:
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
        return Question(name, row.question, triples, topics, tuple(paths), answers, number)

    def check(self, max_bad_fraction: float = 0.0) -> None:
        """Raises when more than `max_bad_fraction` of the rows are unusable, else logs the count.

        Raises:
            DataError: with every problem as `file:line: path: reason`, the first of them in full.
        """
        if not self.rows and not self._cut_short:
            raise DataError(f"{self.path}: holds no question; expected one JSON object a line.")
        bad = len(self.rejects)
        if self._cut_short or bad > max_bad_fraction * self.rows:
            shown = [f"{self.path}:{problem}" for problem in self.rejects[:_LISTED_PROBLEMS]]
            if bad > _LISTED_PROBLEMS:
                shown.append(f"... and {bad - _LISTED_PROBLEMS} more problems")
            told = f"{self.path}: {bad} of {self.rows} rows cannot be used."
            if not self._cut_short:
                told += (
                    f" At most a fraction of {max_bad_fraction:.4g} may be: correct them, or set"
                )
                told += " --set data.max_bad_fraction=FRACTION."
            raise DataError("\n".join([*shown, told]))
        if bad:
            logger.warning("%s: skipped %d of %d unusable rows", self.path, bad, self.rows)
        if found := self.notes["topics_from_paths"]:
            logger.warning(
                "%s: %d questions name no topic entity; the first of each of their paths is taken",
                self.path,
                found,
            )


def default_id(path: Path, line: int) -> str:
    """The id of a question that has none: file name without its endings, and line."""
    return f"{path.name.split('.')[0]}-{line}"


def read_questions(
    path: str | Path, *, max_bad_fraction: float = 0.0, max_line_bytes: int = MAX_LINE_BYTES
) -> QuestionFile:
    """Reads a whole file in one pass.

    Keys: `question` and `triples` (required), `paths`, `answer` or `answers`, `topic_entities`,
    `id`; others are ignored. Questions without facts, answers or topics are kept and counted.

    Args:
        path: JSONL, plain or gzip.
        max_bad: share of the rows that may be unusable; they are left out and listed.
        max_line_bytes: a line this long or longer is unusable.

    Returns:
        Questions, problems of the rows left out, and counts.

    Raises:
        DataError: too many unusable rows (all are listed), cut gzip data, or no row at all.
        MissingInputError: no such file.
    """
    reader = QuestionReader(path, max_line_bytes=max_line_bytes)
    questions = tuple(reader)
    reader.check(max_bad_fraction)
    return QuestionFile(questions, tuple(reader.rejects), dict(reader.notes))
