"""Statements of N-Triples as names."""

from __future__ import annotations

import re
import sys

from dragkit.data.question_row import Triple

_IRI = r"<([^\x00-\x20<>\"]*)>"
_BLANK = r"(_:[^\s<>\"]*[^\s<>\".])"
_LITERAL = r'"([^"\\]*(?:\\.[^"\\]*)*)"(?:\^\^<[^\x00-\x20<>"]*>|@[A-Za-z0-9-]+)?'
_STATEMENT = re.compile(
    rf"[ \t]*(?:{_IRI}|{_BLANK})[ \t]*{_IRI}[ \t]*(?:{_IRI}|{_BLANK}|{_LITERAL})[ \t]*\."
    r"[ \t]*(?:#.*)?"
)
_NOTHING = re.compile(r"[ \t]*(?:#.*)?")
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))", re.DOTALL)
_LETTERS = {"t": "\t", "b": "\b", "n": "\n", "r": "\r", "f": "\f", '"': '"', "'": "'", "\\": "\\"}


def parse_statement(line: str) -> Triple | None:
    """Returns the names of a statement, None for a comment or a blank line.

    An IRI is the text between its angle brackets, and a blank node keeps its `_:`. A literal is its
    text, without language and type. Escapes are decoded.

    Raises:
        ValueError: the line is no statement, or an escape stands for no character.
    """
    if (found := _STATEMENT.fullmatch(line)) is None:
        if _NOTHING.fullmatch(line):
            return None
        raise ValueError(
            "no statement of N-Triples. It needs a subject <IRI> or _:label, a predicate <IRI>, "
            'an object <IRI>, _:label or "text", and a full stop'
        )
    subject, blank_subject, predicate, iri, blank_object, literal = found.groups()
    head = blank_subject if subject is None else subject
    tail = next(text for text in (iri, blank_object, literal) if text is not None)
    if "\\" in line:
        return _unescape(head), _unescape(predicate), _unescape(tail)
    return head, predicate, tail


def _unescape(text: str) -> str:
    decoded = _ESCAPE.sub(_character, text)
    try:
        # Some writers escape a character beyond U+FFFF as two surrogates.
        return decoded.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError as error:
        raise ValueError("not valid UTF-8, or a surrogate alone is escaped") from error


def _character(escape: re.Match[str]) -> str:
    code, letter = escape[1] or escape[2], escape[3]
    if code is not None:
        if int(code, 16) > sys.maxunicode:
            raise ValueError(f"the escape {escape[0]} stands for no character")
        return chr(int(code, 16))
    if letter not in _LETTERS:
        raise ValueError(f"the escape {escape[0]} stands for no character")
    return _LETTERS[letter]
