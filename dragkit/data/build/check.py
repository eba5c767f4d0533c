"""`data check`: errors, duplicates and leaks of files of questions, and what they can teach."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path

from dragkit import __version__
from dragkit.console import output_file, show
from dragkit.data.build.figure_table import column_names, text_tables
from dragkit.data.build.figures import Figures, read_figures
from dragkit.data.build.overlap import overlap, shared_questions, split_of_file
from dragkit.data.lines import open_source
from dragkit.errors import DataError, MissingInputError

_SHARED = {
    "id": "ids",
    "text": "questions",
    "text_and_graph": "questions with their facts",
    "group": "groups",
    "topic_and_answer": "pairs of topic and answer",
}


class Pair:
    """Two files, in the order of the command line.

    Attributes:
        first, second: their figures.
        shared: what they share.
        are_two_splits: whether their names tell two splits.
    """

    def __init__(self, first: Figures, second: Figures) -> None:
        self.first, self.second = first, second
        self.shared = overlap(first.keys, second.keys)
        splits = {split_of_file(first.path), split_of_file(second.path)}
        self.are_two_splits = len(splits) == 2 and None not in splits

    def leaks(self) -> Iterator[str]:
        """Yields the questions that are in two splits as `file:line: path: reason`."""
        if not self.are_two_splits:
            return
        for line, other in shared_questions(self.first.keys, self.second.keys):
            yield (
                f"{self.second.path}:{line}: $.question: the same question as on line {other} of "
                f"{self.first.path}, which is another split"
            )


def check_files(
    paths: Sequence[Path], *, report: Path | None = None, allow_leakage: bool = False
) -> None:
    """Reads files of questions, shows their figures, and raises what is wrong with them.

    All files are read to their end, whatever is wrong with one of them.

    Args:
        paths: JSONL, plain or gzip.
        report: JSON file to write.
        allow_leakage: accept a question that is in two splits.

    Raises:
        MissingInputError: lists all files that cannot be read. Nothing is read then.
        DataError: lists all unusable rows, and all questions that are in two splits.
        WriteError: the report or standard output cannot be written.
    """
    require_files(paths)
    target = output_file(report, "Name another file with --report.") if report else nullcontext()
    with target as file:
        errors, files = [], []
        for path in paths:
            figures, error = read_figures(path)
            files.append(figures)
            errors += str(error).splitlines() if error else []
        pairs = [Pair(first, second) for first, second in combinations(files, 2)]
        leaks = [leak for pair in pairs for leak in pair.leaks()]
        for table in text_tables(files):
            show(f"{table}\n")
        show("\n".join(_remarks(files, pairs)))
        if file is not None:
            document = _document(files, pairs, [*errors, *leaks])
            json.dump(document, file, indent=1, ensure_ascii=False)
            file.write("\n")
    if leaks and not allow_leakage:
        errors += leaks
        errors.append(
            f"{len(leaks)} questions are in two splits. Remove each from one of them, or accept "
            "them with --allow_leakage."
        )
    if errors:
        raise DataError("\n".join(errors))


def require_files(paths: Sequence[Path]) -> None:
    """Raises where files cannot be read.

    Raises:
        MissingInputError: lists all of them.
    """
    missing = []
    for path in paths:
        try:
            open_source(path).close()
        except MissingInputError as error:
            missing.append(str(error))
        except DataError:
            # A file that is no gzip is reported with the unusable rows of the others.
            continue
    if missing:
        raise MissingInputError("\n".join(missing))


def _remarks(files: Sequence[Figures], pairs: Sequence[Pair]) -> Iterator[str]:
    """Yields lines below the table: reasons with examples, and what files share."""
    names = dict(zip(files, column_names(files), strict=True))
    for figures, name in names.items():
        if figures.gaps.counts:
            yield f"{name}: questions without a positive fact: {figures.gaps}"
        if figures.unread:
            yield f"{name}: keys that are not read: {figures.unread}"
    for pair in pairs:
        counts = pair.shared._asdict().items()
        found = [f"{count:,} {_SHARED[kind]}" for kind, count in counts if count]
        of = f"{names[pair.first]} and {names[pair.second]}"
        if found or pair.are_two_splits:
            kind = "two splits" if pair.are_two_splits else "not two splits by their names"
            yield f"{of} ({kind}) share {', '.join(found) or 'nothing'}"
    if not any(pair.are_two_splits for pair in pairs):
        yield "No two files are of different splits by their names, so leakage was not checked."


def _document(
    files: Sequence[Figures], pairs: Sequence[Pair], problems: list[str]
) -> dict[str, object]:
    return {
        "dragkit": __version__,
        "files": [f.document() | {"split": split_of_file(f.path)} for f in files],
        "shared": [
            {
                "files": [os.fspath(pair.first.path), os.fspath(pair.second.path)],
                "two_splits": pair.are_two_splits,
                **pair.shared._asdict(),
            }
            for pair in pairs
        ],
        "problems": problems,
    }
