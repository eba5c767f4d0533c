"""Questions of NSM, GraftNet and ReaRev: `*_simple.json` with entities and relations by number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from dragkit.data.build.record_questions import Reading
from dragkit.data.build.records import text_cells, text_lines
from dragkit.data.build.source_question import (
    Item,
    SourceProblem,
    SourceQuestion,
    group_of_id,
    split_of_name,
)
from dragkit.data.lines import open_source
from dragkit.data.question_file import Question, default_id
from dragkit.data.question_row import Fault, Triple, decode_fields
from dragkit.errors import DataError

_NAME_FILES = ("entities_names.json", "entity_name.txt", "entity_names.txt")
# What a file of names says of an entity without one.
_NO_NAME = "None"


class _Answer(msgspec.Struct):
    kb_id: str | None = None
    text: str | None = None


class _Subgraph(msgspec.Struct):
    tuples: list[tuple[int | str, int | str, int | str]] = []


class _Row(msgspec.Struct):
    question: str
    id: str | int | None = None
    answers: list[_Answer] = []
    entities: list[int | str] = []
    subgraph: _Subgraph = msgspec.field(default_factory=_Subgraph)


_DECODER = msgspec.json.Decoder(_Row)


class _Vocabulary:
    """The lines of a file by number, from 0. A file has millions, so they stay bytes."""

    def __init__(self, path: Path) -> None:
        with open_source(path) as stream:
            self._data = stream.read()
        if not self._data.endswith(b"\n"):
            self._data += b"\n"
        ends = np.flatnonzero(np.frombuffer(self._data, dtype=np.uint8) == 10)
        self._bounds = np.concatenate([[-1], ends])
        try:
            self._data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = int(np.searchsorted(ends, error.start)) + 1
            raise DataError(f"{path}:{line}: $: not UTF-8: {error.reason}") from error

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, row: int) -> str:
        line = self._data[self._bounds[row] + 1 : self._bounds[row + 1]]
        return line.decode("utf-8").rstrip("\r")


class _Names:
    """Names of entities and relations that a line gives by number or by id.

    Attributes:
        by_id: names of entities, empty where these are called by their ids.
    """

    def __init__(self, folder: Path, *, entity_ids: bool) -> None:
        self.by_id = {} if entity_ids else _entity_names(folder)
        self._folder = folder
        self._vocabulary: dict[str, _Vocabulary] = {}

    def entity(self, value: int | str, where: str) -> str:
        """Returns the name of an entity, its id where it has none."""
        name = self._listed(value, "entities", where)
        return self.by_id.get(name, name)

    def relation(self, value: int | str, where: str) -> str:
        """Returns the name of a relation."""
        return self._listed(value, "relations", where)

    def _listed(self, value: int | str, kind: str, where: str) -> str:
        if isinstance(value, str):
            return value
        if kind not in self._vocabulary:
            self._vocabulary[kind] = _Vocabulary(_vocabulary_file(self._folder, kind))
        lines = self._vocabulary[kind]
        if not 0 <= value < len(lines):
            raise _OutOfRange(where, f"no line {value} in {kind}.txt, which has {len(lines)}")
        return lines[value].partition("\t")[0]


def nsm_questions(path: Path, reading: Reading) -> Iterator[Item]:
    """Yields the questions of a `*_simple.json`, one JSON object per line.

    `entities` are the topics. Numbers are lines of `entities.txt` and `relations.txt` in the folder
    of the file, from 0. Where a file of names stands there too, a named entity is called by its
    name.

    Raises:
        MissingInputError: a line has numbers, and a file of these is missing.
        DataError: a file of names or numbers cannot be used.
    """
    names = _Names(path.parent, entity_ids=reading.entity_ids)
    for item in text_lines(path):
        if isinstance(item, SourceProblem):
            yield item
            continue
        number, line = item
        row = _decoded(line)
        if isinstance(row, Fault):
            yield SourceProblem(path, number, *row)
            continue
        try:
            question = _question(row, names, number, path, reading.limit_triples)
        except _OutOfRange as fault:
            yield SourceProblem(path, number, *fault.args)
            continue
        yield SourceQuestion(question, split_of_name(path.name), group_of_id(str(row.id or "")))


def _question(row: _Row, names: _Names, number: int, path: Path, limit: int | None) -> Question:
    topics = [names.entity(value, f"$.entities[{i}]") for i, value in enumerate(row.entities)]
    triples: list[Triple] = []
    for i, (head, relation, tail) in enumerate(row.subgraph.tuples[:limit]):
        at = f"$.subgraph.tuples[{i}]"
        triples.append(
            (names.entity(head, at), names.relation(relation, at), names.entity(tail, at))
        )
    answers = [_answer_name(answer, names.by_id) for answer in row.answers]
    return Question(
        ("" if row.id is None else str(row.id)) or default_id(path, number),
        row.question,
        tuple(dict.fromkeys(triples)),
        tuple(dict.fromkeys(topics)),
        (),
        tuple(dict.fromkeys(answer for answer in answers if answer)),
        number,
    )


class _OutOfRange(Exception):
    """A number beyond the lines of its file: the path of the fault and the reason."""


def _decoded(line: bytes) -> _Row | Fault:
    fields = decode_fields(line)
    if isinstance(fields, Fault):
        return fields
    try:
        return _DECODER.decode(line)
    except msgspec.DecodeError as error:
        reason, _, path = str(error).partition(" - at `")
        return Fault(path.rstrip("`") or "$", reason)


def _answer_name(answer: _Answer, names: dict[str, str]) -> str:
    """Returns an answer as the graph calls it: by its name only where entities have names."""
    if answer.kb_id is None:
        return answer.text or ""
    return (names.get(answer.kb_id) or answer.text or answer.kb_id) if names else answer.kb_id


def _vocabulary_file(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.txt"
    # Without a list of its own, the order of the names is that of the numbers.
    listed = folder / "entity_name.txt"
    return listed if kind == "entities" and not path.exists() and listed.exists() else path


def _entity_names(folder: Path) -> dict[str, str]:
    """Returns the names of entities by id, of the first file of names in the folder."""
    path = next((p for name in _NAME_FILES if (p := folder / name).exists()), None)
    if path is None:
        return {}
    if path.suffix == ".json":
        with open_source(path) as stream:
            data = stream.read()
        try:
            given = msgspec.json.decode(data, type=dict[str, str | None])
        except msgspec.DecodeError as error:
            raise DataError(f"{path}:1: $: expected an object of names: {error}") from error
        return {key: name for key, name in given.items() if name and name != _NO_NAME}
    names: dict[str, str] = {}
    problems = []
    for item in text_cells(path, "\t"):
        if isinstance(item, SourceProblem):
            problems.append(str(item))
        elif len(item[1]) != 2:
            problems.append(f"{path}:{item[0]}: $: expected an id, a tab and a name")
        elif item[1][1] not in ("", _NO_NAME):
            names[item[1][0]] = item[1][1]
    if problems:
        raise DataError("\n".join(problems))
    return names
