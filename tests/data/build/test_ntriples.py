"""Statements of N-Triples, by hand."""

from __future__ import annotations

import pytest

from dragkit.data.build.ntriples import parse_statement


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("<http://a/b> <p> <o> .", ("http://a/b", "p", "o")),
        ("<a><p><o>.", ("a", "p", "o")),
        ("\t<a>\t<p>\t<o>\t. # said", ("a", "p", "o")),
        ("_:b0 <p> _:b1.2 .", ("_:b0", "p", "_:b1.2")),
        ("_:b0 <p> _:b1.", ("_:b0", "p", "_:b1")),
        ('<a> <p> "text" .', ("a", "p", "text")),
        ('<a> <p> "" .', ("a", "p", "")),
        ('<a> <p> "à"@fr-BE .', ("a", "p", "à")),
        ('<a> <p> "1"^^<http://int> .', ("a", "p", "1")),
        ('<a> <p> " # <x> . "@en . # "', ("a", "p", " # <x> . ")),
        (r'<a> <p> "\t\b\n\r\f\"\'\\" .', ("a", "p", "\t\b\n\r\f\"'\\")),
        (r'<a> <p> "\\u0041" .', ("a", "p", r"\u0041")),
        (r'<\u00e9> <\U0001F600> "\uD83D\uDE00" .', ("é", "😀", "😀")),
        (r'<a> <p> "\\" .', ("a", "p", "\\")),
        ("# comment", None),
        ("  # comment", None),
        (" \t", None),
        ("", None),
    ],
)
def test_statements(line: str, expected: tuple[str, str, str] | None) -> None:
    assert parse_statement(line) == expected


@pytest.mark.parametrize(
    "line",
    [
        "<a> <p> <o>",
        "<a> <p> .",
        '"a" <p> <o> .',
        "<a> _:p <o> .",
        "<a> <p> <o> <g> .",
        "<a b> <p> <o> .",
        '<a> <p> "o .',
        '<a> <p> "o\\" .',
        '<a> <p> "o"o" .',
        "<a> <p> <o> . <a> <p> <o> .",
        "a p o .",
        r'<a> <p> "\x" .',
        r'<a> <p> "\u12" .',
        r'<a> <p> "\uD800" .',
        r'<a> <p> "\U00110000" .',
        "@prefix a: <b> .",
    ],
)
def test_lines_that_are_no_statement(line: str) -> None:
    with pytest.raises(ValueError, match="no statement|stands for no character|not valid UTF-8"):
        parse_statement(line)
