"""Files that cannot be opened: what is said, and the exit code. Blocks of lines."""

from __future__ import annotations

import gzip
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dragkit.data.lines import Blocks, open_source
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


@given(
    text=st.lists(st.sampled_from([b"", b"a", b"bcd\r", b"\xff", b"e" * 9, b"f" * 30])).map(
        b"\n".join
    ),
    size=st.integers(1, 40),
    limit=st.integers(1, 40),
    is_zipped=st.booleans(),
)
@example(text=b"", size=5, limit=5, is_zipped=False)
@example(text=b"f" * 200 + b"\na", size=5, limit=7, is_zipped=True)
def test_blocks_are_whole_lines_in_order(
    text: bytes, size: int, limit: int, is_zipped: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines"
        path.write_bytes(gzip.compress(text) if is_zipped else text)
        blocks = Blocks(path, size, limit)
        found = list(blocks)
        if not is_zipped:
            assert sum(block.source_bytes for block in found) == len(text)
    expected = [line + b"\n" for line in text.split(b"\n")]
    expected[-1] = expected[-1][:-1]
    expected = [line for line in expected if line]
    assert blocks.num_lines == len(expected)
    assert [block.number for block in found] == list(range(len(found)))
    for block, after in zip(found, [*found, None][1:], strict=True):
        last = after.first_line if after else len(expected) + 1
        lines = block.data.split(b"\n")
        lines = [line + b"\n" for line in lines[:-1]] + [line for line in lines[-1:] if line]
        assert len(lines) == last - block.first_line
        for line, whole in zip(lines, expected[block.first_line - 1 : last - 1], strict=True):
            # A line within the limit is whole. A longer one may be cut, and is still too long.
            assert line == whole or (
                len(whole.rstrip(b"\n")) > limit and len(line.rstrip(b"\n")) > limit
            )
        # All but the last line begin within the size.
        assert sum(map(len, lines[:-1])) < size
