"""Invented entity names: the generator learns to copy names instead of memorising facts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

ONSETS = (*"bcdfghjklmnprstvwz", "br", "st", "kr", "th", "sh")
CODAS = ("", "n", "r", "l", "s")
SYLLABLES = tuple(o + v + c for o in ONSETS for v in "aeiou" for c in CODAS)
ACCENTS = str.maketrans("aeioucn", "áéíöüçñ")
MONTHS = ("January", "March", "May", "July", "October", "December")
WORK_TYPES = ("film", "book", "song", "band", "game", "album", "river", "company")
CONNECTORS = ("of", "the", "and", "de", "in", "for", "&")
WORD_COUNTS, WORD_WEIGHTS = (1, 2, 3, 4), (45, 38, 12, 5)
MACHINE_ALPHABET = "0123456789_bcdfghjklmnpqrstvwxyz"


def invented_word(rng: random.Random) -> str:
    """Draws a capitalised word of two or three syllables."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 2, 3)))).capitalize()


def plain_name(rng: random.Random) -> str:
    """Draws a name of one to four invented words."""
    count = rng.choices(WORD_COUNTS, WORD_WEIGHTS)[0]
    return " ".join(invented_word(rng) for _ in range(count))


def _dated(rng: random.Random) -> str:
    year = rng.randint(1000, 2099)
    return rng.choice(
        (
            f"{year}",
            f"{year}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
            f"{rng.choice(MONTHS)} {rng.randint(1, 28)}, {year}",
            f"{rng.randint(1, 999)}.{rng.randint(0, 99)}",
            f"{year} {invented_word(rng)} {rng.choice(('Open', 'Cup', 'Election', 'Awards'))}",
        )
    )


def _punctuated(rng: random.Random) -> str:
    first, second = invented_word(rng), invented_word(rng)
    return rng.choice(
        (
            f"{first[0]}. {second[0]}. {invented_word(rng)}",
            f"{first} ({rng.choice(WORK_TYPES)})",
            f"{first}, {second}",
            f"{first}-{second}",
            f"O'{first} {second}",
            f"{first}'s {second}",
            f"{first} {rng.choice(CONNECTORS)} {second}",
            f"The {first} {rng.choice(CONNECTORS)} the {second}",
            f"{first}: {second} {rng.randint(2, 9)}",
            f"{first} {second} Jr.",
            f"{first} {second}!",
            first.upper(),
            f"{first[:2].upper()}{rng.randint(1, 99)}",
        )
    )


def _accented(rng: random.Random) -> str:
    name = plain_name(rng)
    start = rng.randrange(len(name))
    return name[:start] + name[start : start + 3].translate(ACCENTS) + name[start + 3 :]


def _machine_id(rng: random.Random) -> str:
    tail = "".join(rng.choice(MACHINE_ALPHABET) for _ in range(rng.randint(4, 6)))
    return f"{rng.choice('mg')}.0{tail}"


# Further kinds of names with their weights. Invented words have weight 58.
OTHER_NAMES = ((_dated, 6), (_punctuated, 8), (_accented, 3), (_machine_id, 3))


class NameSource:
    """Draws entity names: invented words, dates, machine ids, pieces of the vocabulary.

    Args:
        rng: random generator.
        pieces: texts of vocabulary entries. Names joined from them make the model copy every entry.
        listed: real names. The facts around them are invented all the same.
        words_only: draw names of invented words only.
    """

    def __init__(
        self,
        rng: random.Random,
        pieces: Sequence[str] = (),
        listed: Sequence[str] = (),
        *,
        words_only: bool = False,
    ) -> None:
        self.rng = rng
        self.pieces = tuple(pieces)
        self.listed = tuple(listed)
        sources: list[tuple[Callable[[], str], int]] = [(partial(plain_name, rng), 58)]
        if not words_only:
            sources += [(partial(source, rng), weight) for source, weight in OTHER_NAMES]
            sources += [(self._from_pieces, 10)] if self.pieces else []
            sources += [(lambda: rng.choice(self.listed), 22)] if self.listed else []
        self._sources = [source for source, _ in sources]
        self._weights = [weight for _, weight in sources]

    def _from_pieces(self) -> str:
        text = "".join(self.rng.choice(self.pieces) for _ in range(self.rng.randint(2, 6)))
        # A newline would end the fact, and no name starts or ends with a space.
        return " ".join(text.split()) or plain_name(self.rng)

    def draw(self) -> str:
        """Draws one name. Names may repeat."""
        return self.rng.choices(self._sources, self._weights)[0]()
