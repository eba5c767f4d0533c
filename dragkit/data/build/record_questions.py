"""Questions of records: which column is which field, and the fault of a value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from dragkit.data.build.records import Record, Rows
from dragkit.data.build.source_question import Item, SourceProblem, SourceQuestion, group_of_id
from dragkit.data.question_file import default_id, question_of
from dragkit.data.question_row import Fault, Row, Triple, mixed_path

_Names = str | list[str] | None
_TYPES: dict[str, Any] = {
    "question": str,
    "answers": _Names,
    "topics": _Names,
    "id": str | int | None,
    "split": str | None,
    "group": str | int | None,
    "triples": list[Triple] | None,
    "paths": list[list[str | Triple]] | None,
    "evidence": list[Triple] | None,
    "relation_paths": list[tuple[str, ...]] | None,
}
FIELDS = tuple(_TYPES)
# The first of these columns that holds something is the field.
USUAL_NAMES: dict[str, tuple[str, ...]] = {name: (name,) for name in FIELDS} | {
    "question": ("question", "query"),
    "answers": ("answer", "answers"),
    "topics": ("topic_entities", "topics", "topic", "topic_entity", "q_entity"),
    "id": ("id", "qid", "question_id"),
    "triples": ("triples", "graph"),
}
# A cell of a table cannot hold these.
_STRUCTURED = ("triples", "paths", "evidence", "relation_paths")


@dataclass(frozen=True, slots=True)
class Reading:
    """What the user says about a source. `open_source_questions` describes the fields."""

    columns: Mapping[str, str] = field(default_factory=dict)
    separator: str = "|"
    limit_triples: int | None = None
    entity_ids: bool = False

    @property
    def has_header(self) -> bool:
        """Whether a table's first line names its columns. Numbers name them otherwise."""
        return not self.columns or not all(name.isdecimal() for name in self.columns.values())

    def names(self) -> dict[str, tuple[str, ...]]:
        """Returns the columns of each field."""
        return USUAL_NAMES | {key: (name,) for key, name in self.columns.items()}


class _Values(NamedTuple):
    values: dict[str, Any]
    extra: dict[str, Any]


@cache
def _decoder(key: str) -> msgspec.json.Decoder:
    return msgspec.json.Decoder(_TYPES[key])


def _value(key: str, column: str, value: Any) -> Any:
    """Returns the value of a field, or its fault."""
    try:
        if isinstance(value, msgspec.Raw):
            return _decoder(key).decode(value)
        return msgspec.convert(value, _TYPES[key])
    except msgspec.DecodeError as error:
        reason, _, path = str(error).partition(" - at `$")
        reason = reason.replace("`array` of length 3", "a triple [head, relation, tail]")
        return Fault(f"$.{column}{path.rstrip('`')}", reason)


def _read(record: Record, names: Mapping[str, tuple[str, ...]], separator: str) -> _Values | Fault:
    """Returns the fields and the other columns of a record, or its first fault.

    Args:
        separator: stands between the names in a cell of a table, empty where lists are lists.
    """
    fields = record.fields
    values: dict[str, Any] = {}
    for key, columns in names.items():
        if separator and key in _STRUCTURED:
            continue
        for column in columns:
            if column not in fields:
                continue
            value: Any = fields[column]
            if separator:
                value = value.split(separator) if key in ("answers", "topics") else value
            value = _value(key, column, value)
            if isinstance(value, Fault):
                return value
            if value or key not in values:
                values[key] = value
            if value:
                break
    used = {column for columns in names.values() for column in columns}
    extra = {}
    for column in fields:
        if column not in used:
            value = fields[column]
            try:
                extra[column] = msgspec.json.decode(value) if _is_raw(value) else value
            except msgspec.DecodeError as error:
                return Fault(f"$.{column}", str(error))
    return _Values(values, extra)


def _is_raw(value: Any) -> bool:
    return isinstance(value, msgspec.Raw)


def record_questions(
    rows: Rows,
    file: Path,
    required: tuple[str, ...],
    reading: Reading,
    *,
    split: str | None,
    is_table: bool,
) -> Iterator[Item]:
    """Yields the questions of records, and the problems of those that cannot be used.

    Args:
        rows: the records.
        file: they are from it.
        required: fields that every record needs.
        reading: what the user says about them.
        split: the split of records that name none.
        is_table: lists are texts with separators.
    """
    names = reading.names()
    unseen = set(reading.columns.values())
    for item in rows:
        if isinstance(item, SourceProblem):
            yield item
            continue
        unseen.difference_update(item.fields)
        missing = [key for key in required if not any(n in item.fields for n in names[key])]
        if missing:
            fault = Fault("$", _missing(missing[0], names, tuple(item.fields)))
            yield SourceProblem(file, item.line, *fault)
            if is_table:
                return
            continue
        found = _read(item, names, reading.separator if is_table else "")
        result = found if isinstance(found, Fault) else _question(found, item, file, reading, split)
        yield SourceProblem(file, item.line, *result) if isinstance(result, Fault) else result
    for column in sorted(unseen):
        yield SourceProblem(file, 1, f"$.{column}", "no line has this column")


def _missing(key: str, names: Mapping[str, tuple[str, ...]], columns: tuple[str, ...]) -> str:
    wanted = " or ".join(f"`{name}`" for name in names[key])
    return f"no column {wanted} for the {key}. The columns are {', '.join(columns)}"


def _question(
    found: _Values, record: Record, file: Path, reading: Reading, split: str | None
) -> SourceQuestion | Fault:
    values = found.values
    triples = (values.get("triples") or [])[: reading.limit_triples]
    if (fault := mixed_path(values.get("paths"))) is not None:
        return fault
    row = Row(
        values["question"],
        triples,
        paths=values.get("paths"),
        answer=values.get("answers"),
        topic_entities=values.get("topics"),
        evidence=values.get("evidence"),
        relation_paths=values.get("relation_paths"),
    )
    if any("\0" in text for text in _texts(row)):
        return Fault("$", "a NUL character")
    given = values.get("id")
    name = "" if given is None else str(given)
    group = values.get("group")
    return SourceQuestion(
        question_of(row, name or default_id(file, record.line), record.line),
        values.get("split") or split,
        group_of_id(name) if group in (None, "") else str(group),
        found.extra,
    )


def _texts(row: Row) -> Iterator[str]:
    yield row.question
    for names in (row.answer, row.topic_entities):
        yield from [names] if isinstance(names, str) else names or ()
    for triple in row.triples:
        yield from triple
