"""Relation rows and texts."""

from __future__ import annotations

import pytest

from dragkit.data.relations import RelationVocab, relation_text


@pytest.mark.parametrize(
    ("name", "text", "inverse"),
    [
        ("location.country.capital", "country capital", "capital country"),
        ("people.person.place_of_birth", "person place of birth", "birth of place person"),
        ("written_by", "written by", "by written"),
        ("a.b", "a b", "b a"),
        ("film", "film", "film"),
        ("a..b", "b", "b"),
        ("", "", ""),
        ("__x__y", "x y", "y x"),
    ],
)
def test_texts(name: str, text: str, inverse: str) -> None:
    vocab = RelationVocab(["other", name])
    row = vocab.add(name)
    assert relation_text(name) == vocab.text(row) == text
    assert vocab.inverse_text(row) == inverse


def test_rows_follow_the_first_occurrence() -> None:
    vocab = RelationVocab()
    assert [vocab.add(name) for name in ["s", "r", "s", "t", "r"]] == [0, 1, 0, 2, 1]
    assert vocab.names == ("s", "r", "t")
    assert len(vocab) == 3
