"""The folder of a build: parts that are written once, and the files of questions they make."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dragkit.errors import CreateError, DataError, MissingInputError, WriteError

_RECORD = "build.json"
_TOPICS = "missing_topics.txt"
# Level 6 takes twice the time and saves a tenth of the space.
_GZIP_LEVEL = 4


class Line(NamedTuple):
    """A line of a file of questions: JSON without a line end, and the split it belongs to."""

    split: str
    data: bytes


@dataclass
class Part:
    """What is known of a part beside its lines.

    Attributes:
        counts: numbers of questions, facts and findings, by name.
        splits: number of questions of each split.
        missing_topics: place and reason of each question with a topic outside the graph.
    """

    counts: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    missing_topics: list[str] = field(default_factory=list)

    def __iadd__(self, other: Part) -> Part:
        self.counts += other.counts
        self.splits += other.splits
        self.missing_topics += other.missing_topics
        return self


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"{path}: cannot be written: {error.strerror}. Free some space and run the same "
            "command again: it goes on where it stopped."
        ) from error


def _replace(path: Path, data: Sequence[bytes]) -> None:
    """Writes a file so that it is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _differ(held: Mapping[str, object], settings: Mapping[str, object], key: str) -> bool:
    return held.get(key) != json.loads(json.dumps(settings.get(key)))


class BuildFolder:
    """A build's output. Any process may write any part, on any machine that shares the folder.

    A part holds the lines of consecutive questions. It is complete once its record exists, so a
    build that was killed goes on with the parts that have none. The files of questions hold the
    parts in their order, whoever wrote them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parts = path / "parts"

    def record(self) -> dict[str, Any]:
        """Returns what the folder's build is made of and has become, empty where there is none.

        Raises:
            DataError: the record is damaged.
        """
        try:
            return json.loads((self.path / _RECORD).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.path / _RECORD}: cannot be read: {error}. Delete the folder and build "
                "again."
            ) from error

    def create(self, settings: Mapping[str, object]) -> None:
        """Creates the folder, or finds out whether its build may be continued.

        Args:
            settings: inputs and options, as JSON. They must be those of the build it holds, unless
                that has made nothing yet.

        Raises:
            CreateError: the folder cannot be created, or holds something else.
        """
        remedy = "Name another folder with --output."
        record = self.record()
        held = record.get("settings")
        if held is not None and held != json.loads(json.dumps(settings)) and self._has_made(record):
            keys = sorted(k for k in held.keys() | settings.keys() if _differ(held, settings, k))
            raise CreateError(
                f"{self.path}: holds a build with another value of {', '.join(keys)}. {remedy}"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            names = sorted(p.name for p in self.path.iterdir() if p != self._parts)
            if names and not record:
                raise CreateError(
                    f"{self.path}: is not empty and holds no build ({', '.join(names[:3])}). "
                    + remedy
                )
            self._parts.mkdir(exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise CreateError(f"{self.path}: cannot be created: {reason}. {remedy}") from error

    def _has_made(self, record: Mapping[str, object]) -> bool:
        return "counts" in record or any(self._parts.glob("*.json"))

    def begin(self, settings: Mapping[str, object], num_parts: int) -> None:
        """Records what the parts are made of, and their number. `create` comes first.

        Raises:
            WriteError: the folder cannot be written.
        """
        record = {"settings": json.loads(json.dumps(settings)), "num_parts": num_parts}
        if self.record() != record:
            with _writing(self.path):
                self._write_record(record)

    def _write_record(self, record: Mapping[str, object]) -> None:
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        _replace(self.path / _RECORD, [text.encode("utf-8")])

    @property
    def is_complete(self) -> bool:
        """Whether the files of questions are made."""
        return "counts" in self.record()

    def _file(self, number: int, suffix: str) -> Path:
        return self._parts / f"{number:06d}.{suffix}"

    def has_part(self, number: int) -> bool:
        """Returns whether a part is complete."""
        return self._file(number, "json").exists()

    def write_part(self, number: int, lines: Sequence[Line], part: Part) -> None:
        """Writes a part. Its record comes last.

        Raises:
            WriteError: the disk is full or cannot be written.
        """
        by_split: dict[str, list[bytes]] = defaultdict(list)
        for line in lines:
            by_split[line.split].append(line.data)
        part.splits = Counter({split: len(data) for split, data in by_split.items()})
        record = {
            "counts": part.counts,
            "splits": part.splits,
            "missing_topics": part.missing_topics,
        }
        with _writing(self._parts):
            for split, data in by_split.items():
                packed = gzip.compress(b"".join(x + b"\n" for x in data), _GZIP_LEVEL, mtime=0)
                _replace(self._file(number, f"{split}.gz"), [packed])
            _replace(self._file(number, "json"), [json.dumps(record).encode("utf-8")])

    def _read_part(self, number: int) -> Part:
        record = json.loads(self._file(number, "json").read_bytes())
        return Part(Counter(record["counts"]), Counter(record["splits"]), record["missing_topics"])

    def missing_parts(self) -> list[int]:
        """Returns the numbers of the parts that are not there.

        Raises:
            MissingInputError: the folder holds no build.
        """
        return [number for number in range(self._num_parts()) if not self.has_part(number)]

    def _num_parts(self) -> int:
        if not (record := self.record()):
            raise MissingInputError(
                f"{self.path}: holds no build. Name the --output of `python -m dragkit.data build`."
            )
        return record["num_parts"]

    def join(self) -> Part:
        """Makes the files of questions from all parts, and removes the parts.

        Returns:
            The totals.

        Raises:
            MissingInputError: parts are missing.
            WriteError: the disk is full or cannot be written.
        """
        record = self.record()
        if self.is_complete:
            return Part(Counter(record["counts"]), Counter(record["splits"]))
        if missing := self.missing_parts():
            raise MissingInputError(
                f"{self.path}: {len(missing)} of {self._num_parts()} parts are missing, the "
                f"first is {missing[0]}. Run the shards that have not ended, then merge again."
            )
        total = Part()
        for number in range(self._num_parts()):
            total += self._read_part(number)
        with _writing(self.path):
            for split in total.splits:
                self._join_split(split, self._num_parts())
            if total.missing_topics:
                text = "".join(f"{line}\n" for line in total.missing_topics)
                _replace(self.path / _TOPICS, [text.encode("utf-8", "surrogateescape")])
            self._write_record(
                record | {"splits": dict(total.splits), "counts": dict(total.counts)}
            )
            shutil.rmtree(self._parts)
        return total

    def _join_split(self, split: str, num_parts: int) -> None:
        """Puts the gzip members of a split end to end, which is gzip again."""
        target = self.path / f"{split}.jsonl.gz"
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                for number in range(num_parts):
                    if (part := self._file(number, f"{split}.gz")).exists():
                        with part.open("rb") as source:
                            shutil.copyfileobj(source, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
