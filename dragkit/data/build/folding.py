"""Folded text for the comparison of names: letter case and Unicode form do not count."""

from __future__ import annotations

import re
import unicodedata

# Between the letters of a word and what is around them. Names and questions have none.
EDGE = "\0"

_ASCII_WORD = re.compile("[0-9a-z]+")


def fold(text: str) -> str:
    """Returns a text in NFC, case-folded."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFC", text).casefold()


def fold_with_places(text: str) -> tuple[str, list[int]]:
    """Returns `fold(text)`, and for each of its characters the place in the text that it is from.

    The list has one more entry, the length of the text.
    """
    if text.isascii():
        return text.lower(), list(range(len(text) + 1))
    folded: list[str] = []
    places: list[int] = []
    begin = 0
    for end in range(1, len(text) + 1):
        if end < len(text) and _joins(text[begin:end], text[end]):
            continue
        piece = fold(text[begin:end])
        folded.append(piece)
        places += [begin] * len(piece)
        begin = end
    return "".join(folded), [*places, len(text)]


def _joins(piece: str, following: str) -> bool:
    """Whether a character changes with the piece before it when both are normalised."""
    if unicodedata.combining(following):
        return True
    apart = unicodedata.normalize("NFC", piece) + unicodedata.normalize("NFC", following)
    return unicodedata.normalize("NFC", piece + following) != apart


def width(folded: str) -> int:
    """Returns the number of characters. Wide ones count twice, since one of them may be a word."""
    return len(folded) if folded.isascii() else len(folded) + sum(map(_is_wide, folded))


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


def _in_word(character: str) -> bool:
    """Whether a character makes one word with its neighbours.

    Scripts of wide characters do not separate words, so each of these is a word of its own.
    """
    if character.isascii():
        return character.isalnum()
    if _is_wide(character):
        return False
    return character.isalnum() or unicodedata.category(character)[0] == "M"


def mark_edges(folded: str) -> str:
    """Returns a folded text with `EDGE` at both ends of each word.

    One marked text is found in another only where whole words agree.
    """
    if folded.isascii():
        return _ASCII_WORD.sub(f"{EDGE}\\g<0>{EDGE}", folded)
    return mark_edges_with_places(folded)[0]


def mark_edges_with_places(folded: str) -> tuple[str, list[int]]:
    """Returns `mark_edges(folded)`, and for each of its characters the place that it is at.

    The list has one more entry, the length of the folded text.
    """
    marked: list[str] = []
    places: list[int] = []
    before = False
    for place, character in enumerate(folded):
        now = _in_word(character)
        if now != before:
            marked.append(EDGE)
            places.append(place)
        marked.append(character)
        places.append(place)
        before = now
    if before:
        marked.append(EDGE)
        places.append(len(folded))
    return "".join(marked), [*places, len(folded)]
