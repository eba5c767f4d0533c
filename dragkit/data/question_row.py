"""Decodes one line of a file of questions, and finds its fault or the keys that are not read."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import msgspec
import numpy as np

from dragkit.config.unique_keys import unique_keys

Triple = tuple[str, str, str]


class Fault(NamedTuple):
    """JSON path and reason of a problem."""

    path: str
    reason: str


class Row(msgspec.Struct):
    """The keys of a question that are read."""

    question: str
    triples: list[Triple]
    paths: list[list[str | Triple]] | None = None
    answer: str | list[str] | None = None
    answers: str | list[str] | None = None
    topic_entities: str | list[str] | None = None
    id: str | int | None = None
    evidence: list[Triple] | None = None
    relation_paths: list[tuple[str, ...]] | None = None
    group: str | int | None = None


class Decoded(NamedTuple):
    """A row, and its keys that are not read."""

    row: Row
    unread: tuple[str, ...]


_FIELDS = frozenset(Row.__struct_fields__)
_ROW_DECODER = msgspec.json.Decoder(Row)
_RAW_DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])
# What other sets of questions call these fields.
_ALIASES = {
    "answer": ("a_entity", "a_entities", "answer_entities", "gold", "gold_answers", "target"),
    "topic_entities": ("q_entity", "q_entities", "topics", "entities", "seed_entities"),
    "triples": ("graph", "subgraph", "facts", "edges"),
    "question": ("query", "text", "question_text"),
    "id": ("qid", "question_id", "questionid", "uid"),
    "paths": ("gold_paths", "shortest_paths"),
}
_FIELD_OF = {name: field for field, names in _ALIASES.items() for name in names}


@lru_cache(maxsize=1024)
def near_field(key: str) -> str | None:
    """Returns the field that an unknown key probably means: `answer` for `Answer` or `a_entity`."""
    plain = "_".join("".join(c if c.isalnum() else " " for c in key.lower()).split())
    if plain in _FIELD_OF:
        return _FIELD_OF[plain]
    (field, *_) = (*difflib.get_close_matches(plain, sorted(_FIELDS), n=1, cutoff=0.8), None)
    return field


def _raw_fields(line: bytes) -> dict[str, msgspec.Raw]:
    """Returns the values by key, each as its JSON text.

    Raises:
        ValueError: a key is given twice. The decoder would silently keep its last value.
        msgspec.DecodeError: the line is no JSON object.
    """
    # Outside the decoded values each key has two quotes. More quotes mean a second value, or an
    # escaped quote in a key. `unique_keys` tells the two apart.
    values = _RAW_DECODER.decode(line)
    quotes = _num_quotes(line) - sum(map(_num_quotes, values.values()))
    if quotes != 2 * len(values):
        json.loads(line, object_pairs_hook=unique_keys)
    return values


def _num_quotes(data: bytes | msgspec.Raw) -> int:
    # `bytes.count` takes ten times longer where hits are frequent.
    return int(np.count_nonzero(np.frombuffer(data, dtype=np.uint8) == ord('"')))


def _invalid(line: bytes, error: msgspec.ValidationError) -> Fault:
    reason, _, path = str(error).partition(" - at `")
    reason = reason.replace("`array` of length 3", "a triple [head, relation, tail]")
    if "missing required field" in reason:
        near = [key for key in _RAW_DECODER.decode(line) if f"`{near_field(key)}`" in reason]
        if near := [key for key in near if key not in _FIELDS]:
            reason += f". It holds `{near[0]}`, which is not read"
    return Fault(path.rstrip("`") or "$", reason)


def _malformed(error: Exception) -> Fault:
    if isinstance(error, UnicodeDecodeError):
        return Fault("$", f"not UTF-8: {error.reason} (byte {error.start})")
    if isinstance(error, RecursionError):
        return Fault("$", "nested too deeply")
    if isinstance(error, msgspec.DecodeError):
        return Fault("$", f"not valid JSON: {str(error).removeprefix('JSON is malformed: ')}")
    return Fault("$", str(error))


def _has_nul(line: bytes) -> bool:
    # `\\u0000` is an escaped backslash and four zeros. Only an odd backslash escapes a NUL.
    return b"\\u0000" in line and b"\\u0000" in line.replace(rb"\\", b"")


def decode_fields(line: bytes) -> dict[str, msgspec.Raw] | Fault:
    """Returns the values of a JSON object by key, each as its JSON text, or the first fault."""
    try:
        line.decode("utf-8")
        fields = _raw_fields(line)
    except msgspec.ValidationError:
        return Fault("$", "expected a JSON object")
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        return _malformed(error)
    return Fault("$", "a NUL character") if _has_nul(line) else fields


def decode_row(line: bytes) -> Decoded | Fault:
    """Returns the row, or its first fault."""
    try:
        # The decoder skips unknown keys without checking the encoding of their values.
        line.decode("utf-8")
        row = _ROW_DECODER.decode(line)
        unread = tuple(key for key in _raw_fields(line) if key not in _FIELDS)
    except msgspec.ValidationError as error:
        # The decoder stops at the first wrong value. What follows may be no JSON at all.
        try:
            return _invalid(line, error)
        except msgspec.DecodeError as malformed:
            return _malformed(malformed)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        return _malformed(error)
    if (fault := mixed_path(row.paths)) is not None:
        return fault
    if _has_nul(line):
        return Fault("$", "a NUL character")
    return Decoded(row, unread)


def mixed_path(paths: Sequence[Sequence[str | Triple]] | None) -> Fault | None:
    """Returns the fault of the first path that holds entities and triples, None if none does."""
    for index, steps in enumerate(paths or ()):
        if len({type(step) for step in steps}) > 1:
            return Fault(f"$.paths[{index}]", "expected entities or triples, got both")
    return None


def distinct_names(value: str | list[str] | None) -> tuple[str, ...]:
    """Returns the distinct names of a field that holds one, many or none, without blank ones."""
    names = [value] if isinstance(value, str) else value or ()
    return tuple(dict.fromkeys(name for name in names if name.strip()))


def entity_paths(path: Sequence[str | Triple]) -> list[tuple[str, ...]]:
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
