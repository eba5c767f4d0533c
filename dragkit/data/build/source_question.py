"""What a source of questions yields, and the fault of a line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dragkit.data.question_file import Question

_SPLIT_OF_WORD = {
    "train": "train",
    "training": "train",
    "dev": "dev",
    "valid": "dev",
    "val": "dev",
    "validation": "dev",
    "test": "test",
}
# ComplexWebQuestions made its questions from those of WebQSP, whose id is the first part of theirs.
_WEBQSP_ID = re.compile(r"WebQT(?:rn|est)-\d+(?=_|$)")


@dataclass(frozen=True, slots=True)
class SourceQuestion:
    """One question of a source.

    Attributes:
        question: its `triples` are empty where the graph comes from elsewhere, its `topics` where
            the source names none. `line` counts lines or rows of its file, from 1.
        split: "train", "dev", "test" or the source's own word, None where the source has none.
        group: questions of one group must not be in two splits. None: nothing is known.
        extra: what else the source says, by name, as JSON values.
        file: the file that holds it.
    """

    question: Question
    split: str | None = None
    group: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    file: Path = Path()

    @property
    def place(self) -> str:
        """File and line, for messages."""
        return f"{self.file}:{self.question.line}"


class SourceProblem(NamedTuple):
    """A line that cannot be used: its file and number, the path of the fault, and the reason."""

    file: Path
    line: int
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.path}: {self.reason}"


Item = SourceQuestion | SourceProblem


def split_of_name(name: str) -> str | None:
    """Returns the split that a file's name states, None if it states none or several.

    The words count, not parts of them: `train-00000-of-00002.parquet` is "train",
    `WebQSP.test.json` is "test", `latest.jsonl` is none.
    """
    words = re.split(r"[^a-z]+", name.lower())
    splits = {_SPLIT_OF_WORD[word] for word in words if word in _SPLIT_OF_WORD}
    return splits.pop() if len(splits) == 1 else None


def group_of_id(name: str) -> str | None:
    """Returns the WebQSP question that a WebQSP or ComplexWebQuestions id names, None if none."""
    match = _WEBQSP_ID.match(name)
    return match[0] if match else None
