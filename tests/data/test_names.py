"""Names written into a prompt are one line each, and come back as they were."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dragkit.data.names import ANSWER_DELIMITER, read_names, written_name
from dragkit.eval import parse_answers, strict_key

# Mostly the characters that could do harm.
UGLY = st.text(
    st.sampled_from("|\\ \n\r\x0b\x0c\x1c\x85\u2028ab+-5%") | st.characters(), max_size=12
)
NAMES = UGLY.filter(str.strip)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("red|blue", r"red\|blue"),
        ("red | blue", r"red \| blue"),
        ("|", r"\|"),
        ("a\\|b", r"a\\\|b"),
        ("back\\slash\\", "back\\slash\\"),
        ("red\nblue", "red blue"),
        ("red \r\n\r\n blue\n", "red blue"),
        ("red\x0bblue\x85green\u2029", "red blue green"),
        ("two  spaces", "two  spaces"),
        ("\n", ""),
        ("", ""),
    ],
)
def test_by_hand(name: str, written: str) -> None:
    assert written_name(name) == written


@settings(max_examples=500, deadline=None)
@given(st.lists(NAMES, max_size=5))
def test_all_names_of_a_target_come_back(names: list[str]) -> None:
    line = ANSWER_DELIMITER.join(map(written_name, names))
    assert len(line.splitlines()) <= 1
    # Without line ends, to the letter.
    expected = [" ".join(filter(None, map(str.strip, name.splitlines()))) for name in names]
    assert read_names(line) == expected
    # With them, to the same key of the strict scores.
    parsed = parse_answers(f" {line}", keep_repeats=True)
    assert list(map(strict_key, parsed)) == list(map(strict_key, names))


@settings(max_examples=500, deadline=None)
@given(UGLY)
def test_any_line_can_be_read(line: str) -> None:
    names = read_names(line)
    assert all(name and name == name.strip() for name in names)
    if "\\" not in line:
        assert names == [part.strip() for part in line.split("|") if part.strip()]
