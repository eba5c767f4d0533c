"""Invented entity names, so that the generator learns to copy names and not to know facts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

ONSETS = (*"bcdfghjklmnprstvwz", "br", "st", "kr", "th", "sh")
CODAS = ("", "n", "r", "l", "s")
SYLLABLES = tuple(o + v + c for o in ONSETS for v in "aeiou" for c in CODAS)
ACCENTS = str.maketrans("aeioucn", "áéíöüçñ")
MONTHS = ("January", "March", "May", "July", "October", "December")
KINDS = ("film", "book", "song", "band", "game", "album", "river", "company")
LINKS = ("of", "the", "and", "de", "in", "for", "&")
WORD_COUNTS, WORD_WEIGHTS = (1, 2, 3, 4), (45, 38, 12, 5)
MACHINE_ALPHABET = "0123456789_bcdfghjklmnpqrstvwxyz"


def word(rng: random.Random) -> str:
    """One capitalised word of two or three syllables."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 2, 3)))).capitalize()


def plain_name(rng: random.Random) -> str:
    """A name of one to four invented words."""
    count = rng.choices(WORD_COUNTS, WORD_WEIGHTS)[0]
    return " ".join(word(rng) for _ in range(count))


def _dated(rng: random.Random) -> str:
    year = rng.randint(1000, 2099)
    return rng.choice(
        (
            f"{year}",
            f"{year}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
            f"{rng.choice(MONTHS)} {rng.randint(1, 28)}, {year}",
            f"{rng.randint(1, 999)}.{rng.randint(0, 99)}",
            f"{year} {word(rng)} {rng.choice(('Open', 'Cup', 'Election', 'Awards'))}",
        )
    )


def _punctuated(rng: random.Random) -> str:
    first, second = word(rng), word(rng)
    return rng.choice(
        (
            f"{first[0]}. {second[0]}. {word(rng)}",
            f"{first} ({rng.choice(KINDS)})",
            f"{first}, {second}",
            f"{first}-{second}",
            f"O'{first} {second}",
            f"{first}'s {second}",
            f"{first} {rng.choice(LINKS)} {second}",
            f"The {first} {rng.choice(LINKS)} the {second}",
            f"{first}: {second} {rng.randint(2, 9)}",
            f"{first} {second} Jr.",
            f"{first} {second}!",
            first.upper(),
            f"{first[:2].upper()}{rng.randint(1, 99)}",
        )
    )


def _accented(rng: random.Random) -> str:
    name = plain_name(rng)
    spot = rng.randrange(len(name))
    return name[:spot] + name[spot : spot + 3].translate(ACCENTS) + name[spot + 3 :]


def _machine_id(rng: random.Random) -> str:
    tail = "".join(rng.choice(MACHINE_ALPHABET) for _ in range(rng.randint(4, 6)))
    return f"{rng.choice('mg')}.0{tail}"


OTHER_KINDS = ((_dated, 6), (_punctuated, 8), (_accented, 3), (_machine_id, 3))


class NameSource:
    """Draws entity names: invented words, dates, machine ids, pieces of the vocabulary.

    Args:
        rng: source of all randomness.
        pieces: texts of vocabulary entries; names glued from them make every entry worth copying.
        listed: given names, used as strings only (the facts around them are always invented).
        words_only: draw nothing but names of invented words.
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
        kinds: list[tuple[Callable[[], str], int]] = [(partial(plain_name, rng), 58)]
        if not words_only:
            kinds += [(partial(kind, rng), weight) for kind, weight in OTHER_KINDS]
            kinds += [(self._glued, 10)] if self.pieces else []
            kinds += [(lambda: rng.choice(self.listed), 22)] if self.listed else []
        self._kinds = [kind for kind, _ in kinds]
        self._weights = [weight for _, weight in kinds]

    def _glued(self) -> str:
        text = "".join(self.rng.choice(self.pieces) for _ in range(self.rng.randint(2, 6)))
        # A fact line ends its tail at the newline, and a name never starts or ends with a space.
        return " ".join(text.split()) or plain_name(self.rng)

    def draw(self) -> str:
        """One name; names may repeat by chance."""
        return self.rng.choices(self._kinds, self._weights)[0]()
