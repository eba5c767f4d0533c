"""The folder of a build: parts in any order, by any process, and what remains of a fault."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from dragkit.data.build import parts
from dragkit.data.build.parts import BuildFolder, Line, Part
from dragkit.errors import CreateError, DataError, MissingInputError, WriteError

SETTINGS = {"max_facts": 10, "splits": {"train": 1.0}}


def _lines(number: int) -> list[Line]:
    draw = random.Random(number)
    return [
        Line(draw.choice(["train", "dev"]), json.dumps([number, row, "é"]).encode())
        for row in range(draw.randrange(1, 9))
    ]


def _write(folder: BuildFolder, number: int) -> None:
    lines = _lines(number)
    missing = [f"qa.tsv:{number}: topics not in the graph: 'x'"] if number % 2 else []
    folder.write_part(number, lines, Part(Counter(questions=len(lines)), Counter(), missing))


def _begun(path: Path, count: int = 7) -> BuildFolder:
    folder = BuildFolder(path)
    folder.create(SETTINGS)
    folder.begin(SETTINGS, count)
    return folder


def _content(path: Path, split: str) -> list[bytes]:
    return gzip.decompress((path / f"{split}.jsonl.gz").read_bytes()).splitlines()


def test_the_files_hold_the_parts_in_order_whoever_wrote_them(tmp_path: Path) -> None:
    first, second = _begun(tmp_path / "a"), _begun(tmp_path / "b")
    for number in range(7):
        _write(first, number)
    for number in (3, 6, 0, 5, 1, 2, 4):
        _write(BuildFolder(tmp_path / "b"), number)
    total = first.join()
    second.join()
    expected = [line for number in range(7) for line in _lines(number)]
    for split in ("train", "dev"):
        data = [line.data for line in expected if line.split == split]
        assert _content(tmp_path / "a", split) == data
        assert total.splits[split] == len(data)
    assert total.counts == {"questions": len(expected)}
    assert (tmp_path / "a" / "missing_topics.txt").read_text().splitlines() == [
        f"qa.tsv:{number}: topics not in the graph: 'x'" for number in (1, 3, 5)
    ]
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["build.json", "dev.jsonl.gz", "missing_topics.txt", "train.jsonl.gz"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_build_goes_on_with_the_parts_that_are_missing(tmp_path: Path) -> None:
    folder = _begun(tmp_path / "a")
    for number in (0, 2, 5):
        _write(folder, number)
    again = _begun(tmp_path / "a")
    assert again.missing_parts() == [1, 3, 4, 6]
    with pytest.raises(MissingInputError, match="4 of 7 parts are missing, the first is 1"):
        again.join()
    assert not (tmp_path / "a" / "train.jsonl.gz").exists()
    for number in again.missing_parts():
        _write(again, number)
    joined = again.join()
    assert again.is_complete
    # What is joined is left as it is.
    assert BuildFolder(tmp_path / "a").join().counts == joined.counts


def test_a_part_without_its_record_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _begun(tmp_path / "a", 1)
    replace = parts._replace

    def fails_at_record(path: Path, data: list[bytes]) -> None:
        if path.suffix == ".json":
            raise OSError(28, "No space left on device")
        replace(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(parts, "_replace", fails_at_record)
        with pytest.raises(WriteError, match="No space left.*goes on where it stopped"):
            _write(folder, 0)
    assert not folder.has_part(0)
    _write(folder, 0)
    assert folder.has_part(0)
    assert not list((tmp_path / "a").rglob("*.tmp"))


def test_another_build_is_refused(tmp_path: Path) -> None:
    folder = _begun(tmp_path / "a")
    # Nothing is made yet, so nothing is lost.
    BuildFolder(tmp_path / "a").create({**SETTINGS, "max_facts": 11})
    _write(folder, 0)
    BuildFolder(tmp_path / "a").create(SETTINGS)
    with pytest.raises(CreateError, match="another value of max_facts"):
        BuildFolder(tmp_path / "a").create({**SETTINGS, "max_facts": 11})
    with pytest.raises(CreateError, match="another value of seed"):
        BuildFolder(tmp_path / "a").create({**SETTINGS, "seed": 0})
    with pytest.raises(CreateError, match="another value of splits"):
        BuildFolder(tmp_path / "a").create({"max_facts": 10})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    with pytest.raises(CreateError, match=r"holds no build \(thesis.tex\)"):
        BuildFolder(tmp_path / "b").create(SETTINGS)
    (tmp_path / "c").touch()
    with pytest.raises(CreateError, match="cannot be created"):
        BuildFolder(tmp_path / "c").create(SETTINGS)


def test_a_folder_without_a_build_cannot_be_joined(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="holds no build"):
        BuildFolder(tmp_path / "a").join()
    _begun(tmp_path / "a")
    (tmp_path / "a" / "build.json").write_text("{")
    with pytest.raises(DataError, match=r"build\.json: cannot be read"):
        BuildFolder(tmp_path / "a").join()
