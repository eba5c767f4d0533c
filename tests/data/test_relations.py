"""Relation rows and texts."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dragkit.data.relations import RelationVocab, relation_text

FREEBASE = [
    *("location.country.capital", "people.person.place_of_birth", "authority.iso.4217.numeric"),
    *("authority.nist.fips.10_4.adm_div", "base.x2010fifaworldcupsouthafrica.team.group"),
    *("common.topic.notable_types", "user.xg.default_domain.sea_level", "film.actor.film"),
]


@pytest.mark.parametrize(
    ("name", "text", "inverse"),
    [
        ("location.country.capital", "country capital", "capital country"),
        ("people.person.place_of_birth", "person place of birth", "birth of place person"),
        ("written_by", "written by", "by written"),
        ("a.b", "a b", "b a"),
        ("film", "film", "film"),
        ("a..b", "a..b", "a..b"),
        ("", "", ""),
        ("__x__y", "x y", "y x"),
    ],
)
def test_texts(name: str, text: str, inverse: str) -> None:
    vocab = RelationVocab(["other", name])
    row = vocab.add(name)
    assert relation_text(name) == vocab.text(row) == text
    assert vocab.inverse_text(row) == inverse


@pytest.mark.parametrize("name", FREEBASE)
def test_a_freebase_name_gives_its_last_two_parts(name: str) -> None:
    assert relation_text(name) == " ".join(name.split(".")[-2:]).replace("_", " ")


@pytest.mark.parametrize("name", [*FREEBASE, "written_by", "born on 1.1.2000", "http://a.org/x#of"])
@pytest.mark.parametrize(
    ("mark", "word"),
    [
        *(("^{}", "inverse"), ("~{}", "inverse"), ("^ {}", "inverse"), ("{}^-1", "inverse")),
        *(("inv:{}", "inv"), ("inverse_{}", "inverse"), ("inverse of {}", "inverse of")),
        *(("inverse.{}", "inverse"), ("reverse_{}", "reverse"), ("Reversed:{}", "Reversed")),
        *(("rev-{}", "rev"), ("~inv:{}", "inverse inv"), ("^^{}", "inverse inverse")),
    ],
)
def test_a_mark_of_inversion_stays_as_a_word(name: str, mark: str, word: str) -> None:
    assert relation_text(mark.format(name)) == f"{word} {relation_text(name)}"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("population on 1.1.2000", "population on 1.1.2000"),
        ("population_on_1.1.2000", "population on 1.1.2000"),
        ("release.v1.2", "release.v1.2"),
        ("python3.11.support", "python3.11.support"),
        ("supports v1.2.beta of it", "supports v1.2.beta of it"),
        ("U.S._state", "U.S. state"),
        ("e.g. a town", "e.g. a town"),
        ("part.of.(old)", "part.of.(old)"),
        ("http://rdf.freebase.com/ns/people.person.founded", "person founded"),
        ("<http://dbpedia.org/ontology/birthPlace>", "birthPlace"),
        ("http://www.wikidata.org/prop/direct/P19", "P19"),
        ("https://a.org/x#seat_of/", "seat of"),
        ("urn:example:capital", "capital"),
        ("http://x.org/wiki/Property:P19", "P19"),
        ("^", "^"),
        ("inverse of", "inverse of"),
        ("inv:", "inv:"),
        ("^-1", "inverse -1"),
    ],
)
def test_other_names_keep_their_words_and_iris_their_last_part(name: str, text: str) -> None:
    assert relation_text(name) == text


@given(st.text(st.characters(blacklist_categories=["Cs"]), max_size=40))
def test_a_name_with_words_has_a_text(name: str) -> None:
    text = relation_text(name)
    assert bool(text) == any(not c.isspace() and c != "_" for c in name)
    assert text == " ".join(text.split())


def test_dates_and_versions_do_not_become_one_text() -> None:
    labels = [f"{word} {n}.1.2000" for word, n in itertools.product(["born", "died"], range(3))]
    labels += [f"{word}_in_{n}.2" for word, n in itertools.product(["new", "old"], range(3))]
    assert len({relation_text(label) for label in labels}) == len(labels)


def test_a_very_long_name_takes_no_time() -> None:
    for name in ("^", "inv:", "a.", " ", "1.a"):
        relation_text("a" + name * 10**5)
        relation_text(name * 10**5)


def test_rows_follow_the_first_occurrence() -> None:
    vocab = RelationVocab()
    assert [vocab.add(name) for name in ["s", "r", "s", "t", "r"]] == [0, 1, 0, 2, 1]
    assert vocab.names == ("s", "r", "t")
    assert len(vocab) == 3
