"""Drawings of graphs: valid, the same each time, nothing on top of another, no text that acts."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dragkit.observe.drawing import Edge, Node, draw_graph, shortened, visible

NS = "{http://www.w3.org/2000/svg}"
TEXTS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["<script>alert(1)</script>", "]]>&amp;\"'", "\u202eabc", "名" * 30, "\x1b[31m"]
    ),
)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[Node], list[Edge]]:
    nodes = draw(
        st.lists(
            st.builds(Node, TEXTS, st.integers(0, 3), st.booleans(), st.booleans()), max_size=9
        )
    )
    if not nodes:
        return [], []
    ends = st.integers(0, len(nodes) - 1)
    return nodes, draw(st.lists(st.builds(Edge, ends, ends, TEXTS, st.booleans()), max_size=15))


def elements(svg: str, css: str) -> list[ET.Element]:
    return [g for g in ET.fromstring(svg).iter(f"{NS}g") if css in (g.get("class") or "").split()]


def box_of(node: ET.Element) -> tuple[float, float, float, float]:
    box = next(r for r in node.iter(f"{NS}rect") if r.get("class") == "box")
    x, y, width, height = (float(box.get(key)) for key in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_every_graph_is_drawn_whole(graph: tuple[list[Node], list[Edge]]) -> None:
    nodes, edges = graph
    svg = draw_graph(nodes, edges, title="t")
    root = ET.fromstring(svg)
    width, height = float(root.get("width")), float(root.get("height"))
    assert svg == draw_graph(nodes, edges, title="t")
    assert {element.tag.removeprefix(NS) for element in root.iter()} <= {
        *("svg", "title", "style", "defs", "marker", "path", "g", "rect", "circle", "text"),
    }
    boxes = [box_of(node) for node in elements(svg, "node")]
    assert len(boxes) == len(nodes)
    for place, (left, top, right, bottom) in enumerate(boxes):
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        for other in boxes[:place]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
    drawn = elements(svg, "edge")
    assert len(drawn) == len(edges)
    assert len(elements(svg, "marked")) == sum(edge.is_marked for edge in edges)
    # Two labels never start or end at the same place.
    spots = [(t.get("x"), t.get("y")) for g in drawn for t in g.iter(f"{NS}text")]
    assert len(set(spots)) == len(spots) == len(edges)


@given(graphs())
def test_an_edge_ends_at_its_nodes_and_its_arrow_tells_head_from_tail(
    graph: tuple[list[Node], list[Edge]],
) -> None:
    nodes, edges = graph
    # Labels that tell the edges apart, which are drawn in another order.
    edges = [Edge(e.source, e.target, f"edge {i}", e.is_marked) for i, e in enumerate(edges)]
    svg = draw_graph(nodes, edges, title="t")
    boxes = [box_of(node) for node in elements(svg, "node")]
    for group in elements(svg, "edge"):
        edge = edges[int(group.find(f"{NS}title").text.split()[1])]
        path = group.find(f"{NS}path")
        numbers = [float(x) for x in re.findall(r"-?[\d.]+", path.get("d"))]
        ends = [(numbers[0], numbers[1]), (numbers[-2], numbers[-1])]
        way = path.get("marker-end").removeprefix("url(#").split("-")[0].rstrip(")")
        order = (edge.source, edge.target) if way == "out" else (edge.target, edge.source)
        for (x, y), node in zip(ends, order, strict=True):
            left, top, right, bottom = boxes[node]
            assert x == pytest.approx(left, abs=0.11) or x == pytest.approx(right, abs=0.11)
            assert top <= y <= bottom


def test_what_matters_comes_first_and_the_rest_near_its_neighbours() -> None:
    nodes = [Node("topic", 0, is_topic=True), *(Node(f"n{i}", 1) for i in range(4))]
    nodes += [Node("far", 2), Node("near", 2)]
    edges = [Edge(0, i, "r", is_marked=i == 3) for i in range(1, 5)]
    edges += [Edge(4, 5, "r"), Edge(6, 1, "r")]
    svg = draw_graph(nodes, edges, title="t")
    y = {node.find(f"{NS}title").text: box_of(node)[1] for node in elements(svg, "node")}
    assert sorted(["n0", "n1", "n2", "n3"], key=y.get) == ["n2", "n0", "n1", "n3"]
    assert y["near"] < y["far"] and y["topic"] == y["n2"]


def test_topics_and_answers_differ_by_shape_and_marked_edges_by_line() -> None:
    nodes = [Node("t", 0, is_topic=True), Node("a", 1, is_answer=True), Node("o", 1)]
    svg = draw_graph(nodes, [Edge(0, 1, "r", True), Edge(0, 2, "r")], title="t")
    shapes = [
        [sign.tag.removeprefix(NS) for sign in node.iter() if sign.get("class") == "sign"]
        for node in elements(svg, "node")
    ]
    assert shapes == [["rect"], ["path"], ["circle"]]
    style = next(ET.fromstring(svg).iter(f"{NS}style")).text
    assert "prefers-color-scheme: dark" in style
    widths = re.findall(r"\.edge(?:\.marked)? path \{[^}]*stroke-width: (\d)", style)
    assert widths == ["1", "3"]


@given(st.text(max_size=60), st.integers(2, 30))
def test_shown_texts_hold_no_character_that_acts(text: str, width: int) -> None:
    shown = visible(text)
    assert shown.replace("\u200c", "").replace("\u200d", "").isprintable()
    assert text.isprintable() <= (shown == text)
    cut = shortened(text, width)
    if cut != visible(text[: 4 * width]):
        assert cut.endswith("…") and visible(text).startswith(cut[:-1])
    if text.isascii():
        assert len(cut) <= width


@pytest.mark.parametrize(
    ("text", "width", "cut"),
    [
        *(("abc", 3, "abc"), ("abcd", 3, "ab…"), ("名名", 4, "名名"), ("名名名", 4, "名…")),
        *(("e\u0301" * 3, 3, "e\u0301" * 3), ("a\nb", 9, r"a\nb"), ("", 2, "")),
    ],
)
def test_texts_are_cut_by_columns(text: str, width: int, cut: str) -> None:
    assert shortened(text, width) == cut
