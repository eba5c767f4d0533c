"""Splits of questions by group: a function of the group's name alone, on any machine."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Mapping

from dragkit.data.build.source_question import SourceQuestion
from dragkit.errors import ConfigError


def split_of(group: str, fractions: Mapping[str, float], seed: int = 0) -> str:
    """Returns the split of a group: always the same for the same three arguments.

    Where the first fraction grows at the cost of the last, no group leaves the first split.

    Args:
        group: its name.
        fractions: share of the groups by split. They sum to 1.
        seed: another seed splits in another way.

    Raises:
        ConfigError: the fractions are no fractions, or do not sum to 1.
    """
    shares = fractions.values()
    if (
        not fractions
        or not all(share >= 0 for share in shares)
        or abs(math.fsum(shares) - 1) > 1e-9
    ):
        raise ConfigError(f"splits: fractions that sum to 1 are needed, got {dict(fractions)}.")
    digest = hashlib.blake2b(f"{seed}\0{group}".encode("utf-8", "surrogatepass"), digest_size=8)
    # 53 bits, which a double holds exactly: uniform over [0, 1).
    place = (int.from_bytes(digest.digest(), "big") >> 11) * 2.0**-53
    end = 0.0
    for name, share in fractions.items():
        end += share
        if place < end:
            return name
    # Rounding may leave the sum below 1.
    return next(name for name in reversed(list(fractions)) if fractions[name] > 0)


def group_of(question: SourceQuestion) -> str:
    """Returns the group of a question, or its folded text where the source names no group.

    So a question that stands twice in a source, in whatever case and spacing, is in one split.
    """
    if question.group is not None:
        return question.group
    text = unicodedata.normalize("NFC", question.question.text).casefold()
    return " ".join(text.split())
