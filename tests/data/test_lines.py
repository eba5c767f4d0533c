"""Files that cannot be opened: what is said, and the exit code."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dragkit.data.lines import open_source
from dragkit.errors import DragkitError


def folder(root: Path) -> Path:
    (root / "some").mkdir()
    (root / "some" / "train.jsonl").touch()
    return root / "some"


def pipe(root: Path) -> Path:
    os.mkfifo(root / "pipe.jsonl")
    return root / "pipe.jsonl"


def misspelt(root: Path) -> Path:
    (root / "questions_train.jsonl").touch()
    return root / "question_train.jsonl"


def no_folder(root: Path) -> Path:
    return root / "nowhere" / "train.jsonl"


def below_a_file(root: Path) -> Path:
    (root / "file").touch()
    return root / "file" / "train.jsonl"


def dangling(root: Path) -> Path:
    (root / "link.jsonl").symlink_to("gone.jsonl")
    return root / "link.jsonl"


def pointer(root: Path) -> Path:
    (root / "a.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    return root / "a.jsonl"


def too_long(root: Path) -> Path:
    return root / ("x" * 300)


def not_gzip(root: Path) -> Path:
    (root / "a.jsonl.gz").write_text("{}")
    return root / "a.jsonl.gz"


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (folder, 66, "a folder, not a file. Name one of its files: train.jsonl."),
        (pipe, 66, "a pipe"),
        (misspelt, 66, "no such file. Similar names in {root}: questions_train.jsonl."),
        (no_folder, 66, "The folder {root}/nowhere does not exist either."),
        (below_a_file, 66, "cannot be read: Not a directory"),
        (dangling, 66, "a link to gone.jsonl, which does not exist"),
        (pointer, 66, "git lfs pull"),
        (too_long, 66, "File name too long"),
        (not_gzip, 65, "the content is not gzip"),
    ],
)
def test_what_cannot_be_opened_is_named(tmp_path: Path, make, code: int, words: str) -> None:
    path = make(tmp_path)
    with pytest.raises(DragkitError) as error:
        open_source(path)
    assert error.value.exit_code == code
    assert str(error.value).startswith(f"{path}: ")
    assert words.format(root=tmp_path) in str(error.value)
