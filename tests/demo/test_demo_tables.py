"""The tables of the bundled demo knowledge base: format, closure and spelling."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

import dragkit

TABLES = sorted((Path(dragkit.__file__).parent / "demo" / "tables").glob("*.tsv"))


def read(path: Path) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table. Cells hold objects joined by '; '."""
    lines = path.read_text(encoding="utf-8").split("\n")
    assert lines.pop() == "", f"{path.name} must end with exactly one newline"
    header, *rows = (line.split("\t") for line in lines)
    return header, rows


@cache
def facts() -> set[tuple[str, str, str]]:
    """All (subject, relation, object) facts of all tables."""
    found = set()
    for path in TABLES:
        header, rows = read(path)
        for row in rows:
            for relation, cell in zip(header[1:], row[1:], strict=True):
                found.update((row[0], relation, name) for name in cell.split("; ") if name)
    return found


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_format(path: Path) -> None:
    header, rows = read(path)
    assert all(len(relation.split(".")) == 2 for relation in header[1:])
    subjects = [row[0] for row in rows]
    assert subjects == sorted(set(subjects)), "subjects are unique and sorted"
    for row in rows:
        assert len(row) == len(header), row
        # Editors strip trailing tabs, so an empty last cell would be lost.
        assert row[-1], f"the last cell of {row} is empty"
        for cell in row:
            names = cell.split("; ")
            assert len(set(names)) == len(names), cell
            assert all(name == name.strip() and ";" not in name for name in names), cell
            assert unicodedata.is_normalized("NFC", cell), cell


def test_borders_are_mutual() -> None:
    borders = {fact for fact in facts() if fact[1].endswith(".borders")}
    # Knuth's graph of the contiguous states has 107 edges, two of them those of Washington, D.C.
    assert sum(fact[1] == "state.borders" for fact in borders) == 2 * 105
    one_way = {(a, b) for a, relation, b in borders if (b, relation, a) not in borders}
    assert not one_way and all(a != b for a, _, b in borders)


def test_objects_of_closed_relations_have_a_row() -> None:
    subjects = {path.stem: {row[0] for row in read(path)[1]} for path in TABLES}
    counts = {kind: len(subjects[kind]) for kind in ("country", "us_state", "element")}
    assert counts == {"country": 197, "us_state": 50, "element": 118}
    assert sum(map(len, subjects.values())) == len(set.union(*subjects.values())), "shared name"
    subjects["place"] = subjects["city"] | subjects["town"]
    closed = {
        "country.borders": "country",
        "country.official_language": "language",
        "country.region": "region",
        "state.borders": "us_state",
        "state.region": "us_region",
        "river.flows_through": "country",
        "city.country": "country",
        "mountain.country": "country",
        "lake.country": "country",
        "island.country": "country",
        "person.country": "country",
        "landmark.country": "country",
        "museum.city": "place",
        "university.city": "place",
        "landmark.city": "place",
        "moon.planet": "planet",
        "moon.literary_source": "book",
        "opera.composer": "person",
        "composition.composer": "person",
        "invention.inventor": "person",
        "landmark.architect": "person",
        "opera.language": "language",
    }
    missing = {(r, o) for _, r, o in facts() if r in closed and o not in subjects[closed[r]]}
    assert not missing
    numbers = [int(o) for _, r, o in facts() if r == "element.atomic_number"]
    assert sorted(numbers) == list(range(1, 119))


def test_a_person_is_not_a_place() -> None:
    by = defaultdict(set)
    for head, relation, tail in facts():
        by[relation.split(".")[0]].add(head)
        by[relation].add(tail)
    works = by["book"] | by["painting"] | by["opera"] | by["composition"] | by["moon"]
    places = by["person.birthplace"] | by["city"] | by["country"] | by["state"] | by["city.river"]
    assert not by["person"] & (works | places)
    assert not works & places


def test_no_two_spellings_of_one_name() -> None:
    spellings: dict[str, set[str]] = {}
    for subject, _, name in facts():
        for text in (subject, name):
            # In codes, domains and dates signs distinguish names.
            if text[0].isalpha():
                plain = unicodedata.normalize("NFD", text).casefold()
                key = "".join(char for char in plain if char.isalnum())
                spellings.setdefault(key, set()).add(text)
    assert not [names for names in spellings.values() if len(names) > 1]


def test_a_city_lies_in_a_country_of_its_river() -> None:
    known = facts()
    country = {s: o for s, r, o in known if r == "city.country"}
    country |= {o: s for s, r, o in known if r == "country.capital"}
    runs: dict[str, set[str]] = {}
    for river, relation, place in known:
        if relation == "river.flows_through":
            runs.setdefault(river, set()).add(place)
    stray = {
        (city, river)
        for city, relation, river in known
        if relation == "city.river" and river in runs and country[city] not in runs[river]
    }
    assert not stray
