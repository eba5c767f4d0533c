"""What files of questions share: ids, questions, graphs, groups, and pairs of topic and answer.

Texts are compared by 64-bit hashes, so that millions of questions fit into memory. Two different
texts among ten million have the same hash with a probability of about 3e-6.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dragkit.data.gaps import folded
from dragkit.data.question_file import Question

_SPLITS = {
    **{name: name for name in ("train", "dev", "test")},
    **dict.fromkeys(("val", "valid", "validation"), "dev"),
}
# What two files may share.
KINDS = ("id", "text", "text_and_graph", "group", "topic_and_answer")


def split_of_file(path: Path) -> str | None:
    """The split that a file's name tells, "train", "dev" or "test". None for no or several ones."""
    words = re.split(r"[^a-z]+", path.name.lower())
    splits = {_SPLITS[word] for word in words if word in _SPLITS}
    return splits.pop() if len(splits) == 1 else None


class Keys:
    """Hashes of the questions of one file. A 0 stands for a value that a question lacks.

    Attributes:
        id, text, text_and_graph, group, line: one number per question.
        topic_and_answer: one number per pair.
    """

    def __init__(self) -> None:
        self.line = array("q")
        # Python's hash of a text, or of a set of triples in any order, is one of 64 bits. It
        # differs between processes, so no result may depend on it.
        self.id, self.text, self.group, self.text_and_graph, self.topic_and_answer = (
            array("q") for _ in KINDS
        )

    def add(self, question: Question, *, has_id: bool) -> None:
        """Appends one question. `has_id` tells whether the file gives its id."""
        text = folded(question.text)
        self.line.append(question.line)
        self.id.append(hash(question.id) if has_id else 0)
        self.text.append(hash(text))
        self.text_and_graph.append(hash((text, frozenset(question.triples))) if text else 0)
        self.group.append(hash(question.group))
        self.topic_and_answer.extend(map(hash, product(question.topics, question.answers)))


def _distinct(hashes: array) -> np.ndarray:
    values = np.unique(np.frombuffer(hashes, dtype=np.int64))
    return values[values != 0]


def num_repeated(hashes: array) -> int:
    """Number of values that are not the first of their kind. A 0 is no value."""
    return int(np.count_nonzero(np.frombuffer(hashes, dtype=np.int64))) - len(_distinct(hashes))


class Overlap(NamedTuple):
    """Numbers of distinct values that two files share, see `KINDS`."""

    id: int
    text: int
    text_and_graph: int
    group: int
    topic_and_answer: int


def overlap(first: Keys, second: Keys) -> Overlap:
    """Counts what two files share."""
    pairs = ((_distinct(getattr(first, kind)), _distinct(getattr(second, kind))) for kind in KINDS)
    return Overlap(*(len(np.intersect1d(a, b, assume_unique=True)) for a, b in pairs))


def shared_questions(first: Keys, second: Keys) -> Iterator[tuple[int, int]]:
    """Yields the line of each question of `second` whose text `first` has, and its line there."""
    texts, wanted = (np.frombuffer(keys.text, dtype=np.int64) for keys in (first, second))
    # Of equal texts the first line counts, which np.unique returns.
    known, rows = np.unique(texts, return_index=True)
    for row in np.flatnonzero(np.isin(wanted, known) & (wanted != 0)).tolist():
        place = int(np.searchsorted(known, wanted[row]))
        yield second.line[row], first.line[int(rows[place])]
