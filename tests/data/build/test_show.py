"""`data show`: the right question, its facts in order, and a page that does nothing but show."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dragkit.data.__main__ import main
from dragkit.data.build.question_page import MAX_DRAWN, MAX_LISTED, drawn_facts, question_page
from dragkit.data.build.question_view import QuestionView
from dragkit.data.build.show import MAX_OTHERS, find_question
from dragkit.data.question_file import Question
from dragkit.errors import MissingInputError

GOOD = {"question": "q", "triples": [["a", "r", "b"]], "topic_entities": "a", "answer": "b"}
NAMES = st.one_of(
    st.sampled_from(["<script>", "a", "b", "c", "d", '"><img src=x onerror=alert(1)>', "\u202ex"]),
    st.text(min_size=1, max_size=8),
)


def write(path: Path, rows: Sequence[dict | str]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


class Page(HTMLParser):
    """Tags, attributes and texts of a page. Every tag has to be closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.values: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.values |= {value for _, value in attrs if value}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def test_ids_of_the_file_and_default_ids(tmp_path: Path) -> None:
    first = write(tmp_path / "one.jsonl", [GOOD, GOOD | {"id": "two-1"}, GOOD | {"id": "one-4"}])
    rows = [GOOD, "{", GOOD | {"id": "x"}, GOOD]
    second = write(tmp_path / "two.jsonl", rows)
    third = write(tmp_path / "one.json.jsonl", [GOOD] * 3 + [GOOD, GOOD | {"id": "one-4'"}, GOOD])
    found = {
        name: (path, question.line, question.id)
        for name in ("one-1", "two-1", "x", "two-4")
        for path, question in [find_question(name, [first, second])]
    }
    assert found == {
        "one-1": (first, 1, "one-1"),
        # A given id comes before the default id of a later file.
        "two-1": (first, 2, "two-1"),
        "x": (second, 3, "x"),
        "two-4": (second, 4, "two-4"),
    }
    assert find_question("two-1", [second])[1].line == 1
    # As in training, a default id gets a prime where another question has it.
    assert find_question("one-4", [third])[1].line == 4
    assert find_question("one-4'", [third])[1].line == 5
    clash = write(tmp_path / "c.jsonl", [GOOD, GOOD | {"id": "c-1"}])
    assert find_question("c-1", [clash])[1].line == 2
    assert find_question("c-1'", [clash])[1].line == 1


def test_an_unknown_id_names_ids_like_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [GOOD | {"id": name} for name in ("WebQ-117", "WebQ-118", "other", "zzz")]
    path = write(tmp_path / "a.jsonl", [*rows, "{"])
    assert main(["show", "WebQ-11", str(path), "--html", str(tmp_path / "a.html")]) == 66
    out, err = capsys.readouterr()
    assert out == "" and "Ids like it: WebQ-117, WebQ-118" in err and f"{path}: 1." in err
    assert not (tmp_path / "a.html").exists()
    assert main(["show", "WebQ-118", str(path)]) == 0
    with pytest.raises(MissingInputError):
        find_question("", [path])


def test_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "id": "q\u202e1",
        "question": "who\nis it?\x1b[31m",
        "topic_entities": ["t", "gone"],
        "answer": ["nowhere", "y"],
        "triples": [
            *(["x", "r2", "y"], ["t", "r1", "x"], ["z", "s", "t"], ["t", "s", "z"]),
            *(["far", "r", "away"], ["y", "u", "w"], ["z", "p", "z"]),
        ],
        "paths": [["t", "x", "y"]],
        "evidence": [["t", "s", "z"]],
    }
    path = write(tmp_path / "a.jsonl", [row])
    assert main(["show", "q\u202e1", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines() == [
        f"id        q\\u202e1  ({path}:1)",
        "question  who\\nis it?\\x1b[31m",
        "topics    t; gone (not in the graph)",
        "answers   y; nowhere (not in the graph)",
        "graph     7 entities, 7 facts",
        "paths     t > x > y",
        "",
        "positive facts by shortest paths: 2",
        "  1 hop from a topic",
        "    t --r1--> x",
        "  2 hops from a topic",
        "    x --r2--> y",
        "",
        "other facts: 5",
        "  1 hop from a topic",
        "    t --s--> z  (evidence)",
        "    z --s--> t",
        "  2 hops from a topic",
        "    z --p--> z",
        "  3 hops from a topic",
        "    y --u--> w",
        "  no way from a topic",
        "    far --r--> away",
    ]


@st.composite
def questions(draw: st.DrawFn) -> Question:
    triples = draw(st.lists(st.tuples(NAMES, NAMES, NAMES), max_size=90, unique=True))
    known = [name for head, _, tail in triples for name in (head, tail)]
    some = st.lists(st.sampled_from(known), max_size=2) if known else st.just([])
    topics, answers = draw(some), draw(some)
    return Question("<id>", draw(NAMES), tuple(triples), tuple(topics), (), tuple(answers), 1)


@settings(max_examples=80, deadline=None)
@given(questions())
def test_every_page_is_whole_and_does_nothing(question: Question) -> None:
    view = QuestionView(question)
    html = question_page(view)
    assert html == question_page(QuestionView(question))
    page = Page(html)
    assert not page.tags & {"script", "img", "link", "iframe", "object", "a", "base"}
    assert not any(name.startswith("on") or name in ("href", "src") for name in page.attributes)
    assert {value for value in page.values if "://" in value} <= {"http://www.w3.org/2000/svg"}
    assert {value for value in page.values if "url(" in value} <= {
        *("url(#in)", "url(#out)", "url(#in-marked)", "url(#out-marked)")
    }
    assert "\u202e" not in html
    assert html.count("<tr><td>") == len(view.facts)
    drawn = drawn_facts(view)
    assert len(drawn) == min(MAX_DRAWN, len(view.facts)) == html.count('<g class="edge ')
    assert f"{len(view.facts) - len(drawn):,} facts farther away are not drawn" in html or (
        len(drawn) == len(view.facts)
    )


@settings(max_examples=80, deadline=None)
@given(questions())
def test_facts_are_in_order_of_their_distance(question: Question) -> None:
    view = QuestionView(question)
    graph = nx.Graph((head, tail) for head, _, tail in question.triples)
    hops = {
        name: min(
            (
                nx.shortest_path_length(graph, topic, name)
                for topic in question.topics
                if nx.has_path(graph, topic, name)
            ),
            default=None,
        )
        for name in graph
    }
    seen = [(fact.head, fact.relation, fact.tail) for fact in view.facts]
    assert sorted(seen) == sorted(question.triples)
    for fact in view.facts:
        near = [hops[name] for name in (fact.head, fact.tail) if hops[name] is not None]
        assert fact.hops == (min(near) + 1 if near else None)
    order = [(fact.hops is None, fact.hops or 0, *seen[i]) for i, fact in enumerate(view.facts)]
    assert order == sorted(order)


def test_a_large_graph_says_what_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    triples = [["t", "r", "x"], ["x", "r", "answer"]]
    triples += [["t", "s", f"n{i:04}"] for i in range(1500)]
    row = GOOD | {"id": "q", "topic_entities": "t", "answer": "answer", "triples": triples}
    path, html = write(tmp_path / "a.jsonl", [row]), tmp_path / "new" / "a.html"
    assert main(["show", "q", str(path), "--html", str(html)]) == 0
    text, page = capsys.readouterr().out, html.read_text(encoding="utf-8")
    assert f"{1500 - MAX_OTHERS:,} facts farther away are not shown" in text
    assert f"{1502 - MAX_DRAWN:,} facts farther away are not drawn" in page
    assert f"{1500 - MAX_LISTED:,} facts farther away are not listed" in page
    assert page.count('<g class="edge marked"') == 2
    assert len(page) < 1_000_000


def test_a_name_of_a_megabyte_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "n" * 1_000_000
    row = {"id": "q", "question": name, "answer": name, "topic_entities": name}
    path = write(tmp_path / "a.jsonl", [row | {"triples": [[name, name, name]]}])
    html = tmp_path / "a.html"
    assert main(["show", "q", str(path), "--html", str(html)]) == 0
    assert len(capsys.readouterr().out) < 5000 and len(html.read_text()) < 20_000
    assert "1,000,000 characters" in html.read_text()


@pytest.mark.parametrize("command", ["show q", "check", "stats"])
@pytest.mark.parametrize("flag", ["--frob", "--html", "--plot", "--report"])
def test_wrong_flags_exit_2(
    command: str, flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD])
    # Without a value, no flag is right.
    assert main([*command.split(), str(path), flag]) == 2
    assert re.search(r"(unrecognized arguments|expected one argument)", capsys.readouterr().err)


def test_real_questions_are_shown(
    kgqa_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, html = kgqa_data / "cwq_nsm_sample.jsonl.gz", tmp_path / "a.html"
    name = "WebQTest-832_c334509bb5e02cacae1ba2e80c176499"
    assert main(["show", name, str(path), "--html", str(html)]) == 0
    assert "facts farther away are not shown" in capsys.readouterr().out
    assert "2014 World Series" in Page(html.read_text(encoding="utf-8")).text
