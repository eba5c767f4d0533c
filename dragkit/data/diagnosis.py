"""Says what is wrong with a row that the fast decoder refused: every fault, with its JSON path."""

from __future__ import annotations

import json
from collections.abc import Iterator

Fault = tuple[str, str]

_SHOWN_PER_ROW = 5
_KINDS = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


class _NotJson:
    """Stands for a literal such as NaN that Python's parser knows and JSON does not."""

    def __init__(self, literal: str) -> None:
        self.literal = literal


class _Repeated(dict):
    """An object some of whose keys were given twice."""

    def __init__(self, pairs: list[tuple[str, object]]) -> None:
        super().__init__(pairs)
        seen: set[str] = set()
        self.repeated = [key for key, _ in pairs if key in seen or seen.add(key)]


def _kind(value: object) -> str:
    if isinstance(value, _NotJson):
        return value.literal
    return next(name for kind, name in _KINDS.items() if isinstance(value, kind))


def _step(key: str) -> str:
    """A key as part of a path; one that a terminal could misread is quoted and escaped."""
    return f".{key}" if key.isidentifier() and key.isascii() else f"[{json.dumps(key[:60])}]"


def _text_fault(text: str, bad_bytes: bool) -> str | None:
    if "\x00" in text:
        return "a NUL character"
    for character in text:
        if "\ud800" <= character <= "\udfff":
            if bad_bytes and "\udc80" <= character <= "\udcff":
                return f"invalid UTF-8 (byte 0x{ord(character) - 0xDC00:02x})"
            return f"a lone surrogate (\\u{ord(character):04x}), which is no character"
    return None


def _walk(value: object, path: str, bad_bytes: bool) -> Iterator[Fault]:
    """Faults that are wrong anywhere: unreadable text, literals outside JSON, keys given twice."""
    if isinstance(value, _NotJson):
        yield path, f"{value.literal} is not JSON"
    elif isinstance(value, str):
        if (fault := _text_fault(value, bad_bytes)) is not None:
            yield path, fault
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from _walk(item, f"{path}[{place}]", bad_bytes)
    elif isinstance(value, _Repeated):
        for key in value.repeated:
            yield path + _step(key), "this key is given twice"
        for key, item in value.items():
            if (fault := _text_fault(key, bad_bytes)) is not None:
                yield path, f"a key holds {fault}"
            yield from _walk(item, path + _step(key), bad_bytes)


def _strings(value: object, path: str) -> Iterator[Fault]:
    for place, item in enumerate(value):  # type: ignore[arg-type]
        if not isinstance(item, str | _NotJson):
            yield f"{path}[{place}]", f"must be a string, got {_kind(item)}"


def _triple(value: object, path: str) -> Iterator[Fault]:
    if not isinstance(value, list):
        yield path, f"must be a triple [head, relation, tail], got {_kind(value)}"
    elif len(value) != 3:
        yield path, f"must be a triple [head, relation, tail], got {len(value)} items"
    else:
        yield from _strings(value, path)


def _path(value: object, path: str) -> Iterator[Fault]:
    if not isinstance(value, list):
        yield path, f"must be an array of entities or of triples, got {_kind(value)}"
    elif any(isinstance(item, list) for item in value):
        for place, item in enumerate(value):
            yield from _triple(item, f"{path}[{place}]")
    else:
        yield from _strings(value, path)


def _fields(row: dict[str, object]) -> Iterator[Fault]:
    """Faults of the fields this project reads."""
    if "question" not in row:
        yield "$.question", "this field is missing"
    elif not isinstance(row["question"], str | _NotJson):
        yield "$.question", f"must be a string, got {_kind(row['question'])}"
    if "triples" not in row:
        yield "$.triples", "this field is missing"
    for name, check in (("triples", _triple), ("paths", _path)):
        value = row.get(name, [])
        if isinstance(value, list):
            for place, item in enumerate(value):
                yield from check(item, f"$.{name}[{place}]")
        elif not (name == "paths" and value is None):
            yield f"$.{name}", f"must be an array, got {_kind(value)}"
    for name in ("answer", "answers", "topic_entities"):
        value = row.get(name)
        if isinstance(value, list):
            yield from _strings(value, f"$.{name}")
        elif not isinstance(value, str | None):
            yield f"$.{name}", f"must be a string or an array of strings, got {_kind(value)}"
    if not isinstance(row.get("id"), str | int | None) or isinstance(row.get("id"), bool):
        yield "$.id", f"must be a string or an integer, got {_kind(row['id'])}"


def diagnose(line: bytes, decoder_message: str) -> list[Fault]:
    """All faults of a row.

    Args:
        line: the row as read, without its line end.
        decoder_message: what the fast decoder said; reported where nothing clearer is found.

    Returns:
        (JSON path, reason) pairs, at least one unless `decoder_message` is empty; a row with very
        many faults gets the first few and a count.
    """
    if line.startswith(b"\xef\xbb\xbf"):
        return [("$", "a stray byte order mark in front of the row")]
    try:
        line.decode("utf-8")
        bad_bytes = False
    except UnicodeDecodeError:
        bad_bytes = True
    text = line.decode("utf-8", "surrogateescape")
    # Control characters are let through here so that a NUL is found with its path.
    decoder = json.JSONDecoder(object_pairs_hook=_Repeated, parse_constant=_NotJson, strict=False)
    faults: list[Fault] = []
    try:
        row = decoder.decode(text)
        faults = list(_walk(row, "$", bad_bytes))
        if isinstance(row, dict):
            faults += _fields(row)
        else:
            faults += [("$", f"a row must be one JSON object, got {_kind(row)}")]
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            faults = [("$", f"more than one JSON value on the line (column {error.colno})")]
        elif "\x00" in text:
            faults = [("$", f"a NUL character (column {text.index(chr(0)) + 1})")]
        else:
            faults = [("$", f"not valid JSON: {error.msg} (column {error.colno})")]
        if bad_bytes:
            faults.append(("$", "invalid UTF-8"))
    except RecursionError:
        faults = [("$", "nested too deeply")]
    except ValueError as error:
        # Python refuses to convert integers of thousands of digits.
        faults = [("$", f"not readable: {error}")]
    if not faults and decoder_message:
        faults = [("$", decoder_message)]
    faults = list(dict.fromkeys(faults))
    if len(faults) > _SHOWN_PER_ROW:
        more = len(faults) - _SHOWN_PER_ROW
        path, reason = faults[_SHOWN_PER_ROW - 1]
        faults = [*faults[: _SHOWN_PER_ROW - 1], (path, f"{reason} (and {more} more on this line)")]
    return faults
