"""A save that stops at any of its disk operations leaves the whole old or the whole new checkpoint.

The machinery is the self-test's: `FaultyDisk` numbers the disk operations of a save.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from dragkit.checkpoint import atomic, retention
from dragkit.selftest.faulty_disk import OPERATIONS
from dragkit.selftest.outcome import Loss
from dragkit.selftest.saves import DISK_ERRORS, SITUATIONS, SaveCase, save_case


@pytest.fixture(params=SITUATIONS)
def case(request: pytest.FixtureRequest) -> Iterator[SaveCase]:
    with save_case(request.param) as made:
        yield made


def test_a_complete_save_fsyncs_everything(case: SaveCase) -> None:
    calls = case.operations()
    assert len(calls) > 25 and set(OPERATIONS) - set(calls) <= {"rmtree"}


@pytest.mark.parametrize("fault", ["kill", "torn", "power", "after"])
def test_every_crash_leaves_the_old_or_the_new_checkpoint(case: SaveCase, fault: str) -> None:
    calls = case.operations()
    values = [case.crash(point, fault) for point in range(len(calls))]
    assert (fault == "after" or values[0] == case.old) and values[-1] == 2.0
    if fault != "power":
        # One operation commits: the old checkpoint before it, the new one after it.
        assert values == sorted(values, key=lambda value: value == 2.0)


@pytest.mark.parametrize(("code", "lasting"), DISK_ERRORS)
def test_every_disk_error_leaves_the_old_or_the_new_checkpoint(
    case: SaveCase, code: int, lasting: bool
) -> None:
    calls = case.operations()
    assert sum(case.fail(point, code, lasting) for point in range(len(calls))) > 25


def test_a_pointer_that_is_not_fsynced_is_seen(case: SaveCase) -> None:
    """A power cut would undo the renames of `latest` and `best`, though the save has returned."""
    with (
        mock.patch.object(atomic, "fsync_path", lambda path: None),
        pytest.raises(Loss, match="not fsynced"),
    ):
        case.operations()


def test_a_commit_that_is_not_fsynced_is_seen(case: SaveCase) -> None:
    def skip_pointers(path: Path, text: str) -> None:
        path.write_text(text)

    with (
        mock.patch.object(retention, "fsync_path", lambda path: None),
        # The fsync of a pointer's folder would cover the commit.
        mock.patch.object(atomic, "fsync_path", lambda path: None),
        mock.patch("dragkit.checkpoint.checkpoint.write_text_atomically", skip_pointers),
        pytest.raises(Loss, match="step-"),
    ):
        case.operations()


def test_the_file_operations(tmp_path: Path) -> None:
    atomic.make_dirs(tmp_path / "a" / "b")
    path = tmp_path / "a" / "b" / "file"
    assert atomic.write_durably(path, b"abc") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    with pytest.raises(FileExistsError):
        atomic.write_durably(path, b"other")
    (tmp_path / "a" / "b" / "file.tmp").write_text("left by a dead writer")
    atomic.write_text_atomically(path, "new")
    assert path.read_text() == "new" and os.listdir(path.parent) == ["file"]
