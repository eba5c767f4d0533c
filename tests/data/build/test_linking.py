"""Entities in texts, against a search that tries every substring."""

from __future__ import annotations

import gzip
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dragkit.data.build.folding import (
    EDGE,
    fold,
    fold_with_places,
    mark_edges,
    mark_edges_with_places,
)
from dragkit.data.build.graph import Graph
from dragkit.data.build.linking import EntityLinker
from dragkit.errors import DataError

ALPHABET = "abAB .'1\u00e9e\u0301\u00df\u4eac\u1161\u1100\uac00\u0130\u200d-"


def _linker(names: list[str], **options: object) -> EntityLinker:
    degree = np.zeros(len(names), dtype=np.int64)
    return EntityLinker(names, degree, **({"min_length": 1} | options))  # type: ignore[arg-type]


def _found(linker: EntityLinker, text: str) -> list[tuple[str, str]]:
    return [(text[m.start : m.end], m.name) for m in linker.link(text)]


@given(st.text(ALPHABET, max_size=12) | st.text(max_size=12))
@example("\u1100\u1161\u11a8")
@example("\u0b47\u0b3e")
def test_folding_by_pieces_is_folding_the_whole(text: str) -> None:
    folded, places = fold_with_places(text)
    assert folded == fold(text) == unicodedata.normalize("NFC", text).casefold()
    assert len(places) == len(folded) + 1
    assert places == sorted(places)
    assert places[-1] == len(text)
    marked, places = mark_edges_with_places(folded)
    assert marked == mark_edges(folded)
    assert marked.replace(EDGE, "") == folded.replace(EDGE, "")
    assert [folded[p] for c, p in zip(marked, places, strict=False) if c != EDGE] == [
        c for c in folded if c != EDGE
    ]


def _is_word_character(c: str) -> bool:
    if unicodedata.east_asian_width(c) in ("W", "F"):
        return False
    return c.isalnum() or (not c.isascii() and unicodedata.category(c).startswith("M"))


def _slow_link(names: list[str], text: str) -> list[str]:
    """Folded names from left to right, the longest at each place, as whole words."""
    folded, found, at = fold(text), [], 0
    patterns = {fold(n) for n in names if any(c.isalnum() for c in fold(n))}
    # A name that begins inside an earlier match is not found.
    while at < len(folded):
        for end in range(len(folded), at, -1):
            edges = [
                p == 0
                or p == len(folded)
                or not all(map(_is_word_character, folded[p - 1 : p + 1]))
                for p in (at, end)
            ]
            if folded[at:end] in patterns and all(edges):
                found.append(folded[at:end])
                at = end
                break
        else:
            at += 1
    return found


@given(
    st.lists(st.text(ALPHABET, min_size=1, max_size=5), min_size=1, max_size=8, unique=True),
    st.text(ALPHABET, max_size=24),
)
def test_mentions_are_those_of_a_slow_search(names: list[str], text: str) -> None:
    names = sorted(names)
    linker = _linker(names)
    mentions = list(linker._mentions(text))
    assert [fold(m.name) for m in mentions] == _slow_link(names, text)
    for mention in mentions:
        assert names[mention.row] == mention.name
        assert fold(mention.name) in fold(text[mention.start : mention.end])
    starts = [m.start for m in mentions]
    assert starts == sorted(starts)


def test_whole_words_and_the_longest_name_count() -> None:
    linker = _linker(["The Cat", "The", "York", "New York", "New York City", "$9.99", "A.I."])
    assert (
        _found(linker, "the catalogue of New York city")
        == [
            ("the", "The"),
            ("New York city", "New York City"),
        ][1:]
    )
    assert _found(linker, "the catalogue of york's") == [("the", "The"), ("york", "York")]
    assert _found(linker, "is $9.99 a.i.?") == [("$9.99", "$9.99"), ("a.i.", "A.I.")]
    assert _found(linker, "") == []


def test_form_and_case_do_not_count_and_places_are_those_of_the_text() -> None:
    linker = _linker(["\u00c9mile Zola", "Stra\u00dfe", "\u5317\u4eac"])
    assert _found(linker, "who is e\u0301mile zola?") == [("e\u0301mile zola", "\u00c9mile Zola")]
    assert _found(linker, "x STRASSE y") == [("STRASSE", "Stra\u00dfe")]
    assert _found(linker, "\u8c01\u5728\u5317\u4eac\u4f4f") == [("\u5317\u4eac", "\u5317\u4eac")]


def test_ties_go_to_spelling_then_degree_then_row_and_names_before_aliases() -> None:
    graph = Graph.from_triples(
        [
            ("Mercury", "r", "x1"),
            ("mercury", "r", "x1"),
            ("mercury", "r", "x2"),
            ("MERCURY", "r", "x2"),
        ]
    )
    linker = EntityLinker.of_graph(graph)
    assert _found(linker, "on mErcury") == [("mErcury", "mercury")]
    # As it is spelled, whatever the degree.
    assert _found(linker, "on MERCURY") == [("MERCURY", "MERCURY")]
    even = _linker(["MERCURY", "Mercury"], aliases=[("mercury", 1), ("quicksilver", 1)])
    assert _found(even, "mercury, quicksilver") == [
        ("mercury", "MERCURY"),
        ("quicksilver", "Mercury"),
    ]


def test_a_word_in_lower_case_is_no_name_where_others_have_their_capitals() -> None:
    linker = _linker(["Movie", "Ada Reed", "film"])
    assert _found(linker, "which movie or film did Ada Reed direct") == [
        ("film", "film"),
        ("Ada Reed", "Ada Reed"),
    ]
    assert _found(linker, "which movie did ada reed direct") == [
        ("movie", "Movie"),
        ("ada reed", "Ada Reed"),
    ]
    assert _found(linker, "Movie of ada reed") == [("Movie", "Movie"), ("ada reed", "Ada Reed")]
    assert _found(linker, "Film or movie") == [("Film", "film"), ("movie", "Movie")]
    assert _found(linker, "Ada Reed or movie") == [("Ada Reed", "Ada Reed")]


def test_options() -> None:
    names = ["a", "abc", "abcdef", "xy", "\u5317\u4eac"]
    text = "a abc abcdef xy \u5317\u4eac"
    assert [n for _, n in _found(_linker(names, min_length=3), text)] == ["abc", "abcdef", names[4]]
    assert [n for _, n in _found(_linker(names, max_mentions=2), text)] == ["abc", "abcdef"]
    assert [n for _, n in _found(_linker(names, stop_words=["abc", "xy"]), text)] == [
        "a",
        "abcdef",
        names[4],
    ]
    assert _found(_linker(["...", "?", "'"]), "what's this ... ?") == []


def test_names_in_many_questions_are_stop_words() -> None:
    names = ["Ada", "Film", "Ben"]
    linker = _linker(names, stop_words=["Ben"])
    texts = [f"film {i}" for i in range(9)] + ["Ada film Ben", "ada ada ada", "ada"]
    assert linker.learn_stop_words(texts, share=0.5) == ("Film",)
    assert linker.stop_words == ("Ben", "Film")
    assert _found(linker, "Ada film Ben") == [("Ada", "Ada")]
    # Three texts at least, however few there are.
    assert linker.learn_stop_words(["ada", "ada"], share=0.1) == ()
    assert linker.learn_stop_words(["ada", "ada", "Ada"], share=0.1) == ("Ada",)


def test_an_alias_file(tmp_path: Path) -> None:
    graph = Graph.from_triples([("Lantern Guild", "seat", "Dunmarsh")])
    path = tmp_path / "alias.tsv.gz"
    path.write_bytes(gzip.compress(b"the Guild\tLantern Guild\n\nold town\tDunmarsh\r\n"))
    linker = EntityLinker.of_graph(graph, alias_file=path)
    assert _found(linker, "is the guild in old town") == [
        ("the guild", "Lantern Guild"),
        ("old town", "Dunmarsh"),
    ]


def test_wrong_aliases_are_all_reported(tmp_path: Path) -> None:
    graph = Graph.from_triples([("a", "r", "b")])
    path = tmp_path / "alias.tsv"
    path.write_bytes(b"x\ta\nx\ny\tnone\n\xff\tb\nz\ta\tb\nn\0\tb\n")
    with pytest.raises(DataError) as error:
        EntityLinker.of_graph(graph, alias_file=path)
    lines = str(error.value).splitlines()
    assert [line.split(":")[1] for line in lines] == ["2", "3", "4", "5", "6"]
    assert "no entity of the graph is called 'none'" in lines[1]


def test_topics_of_real_questions_are_found(kgqa_data: Path) -> None:
    import json

    with gzip.open(kgqa_data / "kb" / "metaqa.tsv.gz", "rt", encoding="utf-8") as file:
        graph = Graph.from_triples(tuple(line.rstrip("\n").split("\t")) for line in file)
    with gzip.open(kgqa_data / "metaqa.dev.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    linker = EntityLinker.of_graph(graph)
    linker.learn_stop_words([row["question"] for row in rows])
    found = [{m.name for m in linker.link(row["question"])} for row in rows]
    right = sum(set(row["topic_entities"]) == names for row, names in zip(rows, found, strict=True))
    # Measured: 0.972.
    assert right / len(rows) > 0.95
