"""Draws a small directed graph as SVG: nodes in columns, edges with labels, nothing random.

The drawing needs no script, no font and no network. It follows the reader's light or dark theme.
What matters differs by shape and line as well as by colour: a square marks a topic, a diamond an
answer, and a thick line a marked edge.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Widths in columns of a terminal: wide letters have two.
_NODE_CHARS, _EDGE_CHARS = 22, 26
_NODE_PX, _BOLD_PX, _EDGE_PX = 8.0, 8.8, 6.4
_SLOT, _BOX, _GAP, _MARGIN, _CURVE = 17, 26, 9, 12, 64
_MAX_TITLE = 300
_JOINERS = "\u200c\u200d"

STYLE = """\
.graph { --ink: #1a1a1a; --paper: #ffffff; --faint: #767676; --box: #f2f2f2;
  --topic: #cfe5f7; --answer: #fbe0c3; --mark: #00694b; }
@media (prefers-color-scheme: dark) { .graph { --ink: #ececec; --paper: #16181b; --faint: #9a9a9a;
  --box: #26292d; --topic: #12405f; --answer: #5f3a0c; --mark: #58d6ab; } }
.graph { background: var(--paper); font-family: system-ui, sans-serif; }
.graph text { fill: var(--ink); font-size: 13px; }
.graph .edge text { font-size: 11px; fill: var(--ink); paint-order: stroke;
  stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }
.graph .edge path { fill: none; stroke: var(--faint); stroke-width: 1; stroke-dasharray: 4 3; }
.graph .edge.marked path { stroke: var(--mark); stroke-width: 3; stroke-dasharray: none; }
.graph .edge.marked text { font-weight: bold; }
.graph .node rect.box { fill: var(--box); stroke: var(--faint); }
.graph .topic rect.box { fill: var(--topic); stroke: var(--ink); stroke-width: 2; }
.graph .answer rect.box { fill: var(--answer); stroke: var(--ink); stroke-width: 2; }
.graph .topic text, .graph .answer text { font-weight: bold; }
.graph .sign { fill: var(--ink); }
.graph .head { fill: var(--faint); }
.graph .head.marked { fill: var(--mark); }
"""


@dataclass(frozen=True)
class Node:
    """A node: its label, its column from 0 at the left, and whether it is a topic or an answer."""

    label: str
    column: int
    is_topic: bool = False
    is_answer: bool = False


@dataclass(frozen=True)
class Edge:
    """An edge between two nodes, given by their positions. A marked one stands out."""

    source: int
    target: int
    label: str
    is_marked: bool = False


@dataclass
class _Box:
    """Where a node is drawn. `left` and `right` count the edges that have a place at its sides."""

    x: float
    width: float
    y: float = 0.0
    left: int = 0
    right: int = 1

    @property
    def height(self) -> float:
        return max(_BOX, _SLOT * max(self.left, self.right) + 6)

    def side_y(self, slot: int) -> float:
        return self.y + _BOX / 2 + _SLOT * slot


def visible(text: str) -> str:
    """Returns a text whose invisible characters are written as escapes.

    So line ends, terminal codes, and characters that reverse the order of others do nothing. The
    joiners of scripts and emoji stay.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in _JOINERS else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def shortened(text: str, width: int) -> str:
    """Returns the start of a visible text that fits into so many columns of a terminal."""
    text = visible(text[: 4 * width])
    room = width
    for kept, c in enumerate(text):
        room -= _width(c)
        if room < 0:
            return f"{text[: max(0, kept - 1)]}…"
    return text


def _width(text: str) -> int:
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def draw_graph(nodes: Sequence[Node], edges: Sequence[Edge], *, title: str) -> str:
    """Draws a graph as one `<svg>` element with its style.

    In a column, nodes with a marked edge or a mark of their own come first, then each is near its
    neighbours in the columns to the left.

    Args:
        nodes: the nodes. Labels may hold any characters.
        edges: between positions of `nodes`. Parallel edges and loops are drawn one by one.
        title: what a screen reader says.
    """
    columns = _ordered_columns(nodes, edges)
    boxes, spots, size = _place(nodes, edges, columns)
    parts = [
        f'<svg class="graph" xmlns="http://www.w3.org/2000/svg" role="img" '
        f'width="{size[0]:.0f}" height="{size[1]:.0f}" viewBox="0 0 {size[0]:.0f} {size[1]:.0f}">',
        f"<title>{_escaped(title)}</title>",
        f"<style>\n{STYLE}</style>",
        "<defs>",
        *(
            f'<marker id="{way}{mark}" viewBox="0 0 8 8" refX="8" refY="4" orient="auto" '
            f'markerUnits="userSpaceOnUse" markerWidth="9" markerHeight="9">'
            f'<path class="head{mark.replace("-", " ")}" d="{shape}"/></marker>'
            for way, shape in (("out", "M0 0L8 4L0 8z"), ("in", "M8 0L0 4L8 8z"))
            for mark in ("", "-marked")
        ),
        "</defs>",
        # Marked edges are drawn over the others, and nodes over both.
        *(_edge_svg(edges[i], boxes, spots[i]) for i in _marked_last(edges)),
        *(_node_svg(node, box) for node, box in zip(nodes, boxes, strict=True)),
        "</svg>",
    ]
    return "\n".join(parts)


def _escaped(text: str) -> str:
    cut = f"{text[:_MAX_TITLE]}…" if len(text) > _MAX_TITLE else text
    return escape(visible(cut))


def _marked_last(edges: Sequence[Edge]) -> list[int]:
    return sorted(range(len(edges)), key=lambda i: edges[i].is_marked)


def _ordered_columns(nodes: Sequence[Node], edges: Sequence[Edge]) -> list[list[int]]:
    """The nodes of each column from top to bottom."""
    matters = {i for i, node in enumerate(nodes) if node.is_topic or node.is_answer}
    neighbours: list[list[int]] = [[] for _ in nodes]
    for edge in edges:
        neighbours[edge.source].append(edge.target)
        neighbours[edge.target].append(edge.source)
        if edge.is_marked:
            matters |= {edge.source, edge.target}
    place: dict[int, int] = {}
    columns = []
    for column in range(1 + max((node.column for node in nodes), default=-1)):
        rows = [i for i, node in enumerate(nodes) if node.column == column]
        means = {}
        for i in rows:
            places = [place[j] for j in neighbours[i] if j in place]
            means[i] = sum(places) / len(places) if places else float(len(nodes))
        rows.sort(key=lambda i: (i not in matters, means[i], i))
        place |= {i: position for position, i in enumerate(rows)}
        columns.append(rows)
    return columns


def _place(
    nodes: Sequence[Node], edges: Sequence[Edge], columns: Sequence[Sequence[int]]
) -> tuple[list[_Box], list[int], tuple[float, float]]:
    """Boxes of the nodes, the slot of each edge at its right-hand node, and width and height."""
    order = {i: position for rows in columns for position, i in enumerate(rows)}
    boxes = [
        _Box(
            0.0,
            (_BOLD_PX if node.is_topic or node.is_answer else _NODE_PX)
            * _width(shortened(node.label, _NODE_CHARS))
            + 34,
        )
        for node in nodes
    ]
    spots = [0] * len(edges)
    # Room for labels left of each column, and right of it for edges within the column.
    room = [[0.0, 0.0] for _ in columns]
    for i in sorted(range(len(edges)), key=lambda i: (*_ends(edges[i], nodes, order), i)):
        inner, outer = _ends(edges[i], nodes, order)
        length = _EDGE_PX * _width(shortened(edges[i].label, _EDGE_CHARS)) + 16
        column = nodes[outer].column
        if nodes[inner].column == column:
            spots[i], boxes[outer].right = boxes[outer].right, boxes[outer].right + 1
            room[column][1] = max(room[column][1], length + 34)
        else:
            spots[i], boxes[outer].left = boxes[outer].left, boxes[outer].left + 1
            room[column][0] = max(room[column][0], length)
    x, height = float(_MARGIN), 0.0
    for column, rows in enumerate(columns):
        x += room[column][0] + (_CURVE if column else 0)
        y = float(_MARGIN)
        for i in rows:
            boxes[i].x, boxes[i].y = x, y
            y += boxes[i].height + _GAP
        height = max(height, y)
        x += max((boxes[i].width for i in rows), default=0.0) + room[column][1]
    return boxes, spots, (x + _MARGIN, height + _MARGIN)


def _ends(edge: Edge, nodes: Sequence[Node], order: dict[int, int]) -> tuple[int, int]:
    """The end further left, or above in one column, and the other end, at which the label is."""
    ends = sorted((edge.source, edge.target), key=lambda i: (nodes[i].column, order[i]))
    return ends[0], ends[1]


def _edge_svg(edge: Edge, boxes: Sequence[_Box], slot: int) -> str:
    source, target = boxes[edge.source], boxes[edge.target]
    label = shortened(edge.label, _EDGE_CHARS)
    length = _EDGE_PX * _width(label) + 12
    inner, outer = sorted((source, target), key=lambda box: (box.x, box.y))
    y = outer.side_y(slot)
    if inner.x == outer.x:
        # Within a column: out to the right, and back to the lower node.
        right, x1 = outer.x + outer.width, inner.x + inner.width
        far, y1 = max(right, x1) + 26, inner.side_y(0) + (6 if inner is outer else 0)
        path = f"M{x1:.1f} {y1:.1f}C{far:.1f} {y1:.1f} {far:.1f} {y:.1f} {right:.1f} {y:.1f}"
        text = f'<text x="{right + 30:.1f}" y="{y + 4:.1f}">'
    else:
        x1, y1, bend = inner.x + inner.width, inner.side_y(0), outer.x - length
        path = (
            f"M{x1:.1f} {y1:.1f}C{(x1 + bend) / 2:.1f} {y1:.1f} {(x1 + bend) / 2:.1f} {y:.1f} "
            f"{bend:.1f} {y:.1f}L{outer.x:.1f} {y:.1f}"
        )
        text = f'<text x="{outer.x - 12:.1f}" y="{y - 3:.1f}" text-anchor="end">'
    # Each edge has a place of its own at the outer node alone, so its arrow stands there.
    way = "out" if target is outer else "in"
    mark = "marked" if edge.is_marked else ""
    return (
        f'<g class="edge {mark}"><title>{_escaped(edge.label)}</title>'
        f'<path d="{path}" marker-end="url(#{way}{mark and f"-{mark}"})"/>'
        f"{text}{escape(label)}</text></g>"
    )


def _node_svg(node: Node, box: _Box) -> str:
    css = " ".join(
        ["node", *(["topic"] if node.is_topic else []), *(["answer"] if node.is_answer else [])]
    )
    x, y = box.x, box.y + _BOX / 2
    signs = ""
    if node.is_topic:
        signs += f'<rect class="sign" x="{x + 8:.1f}" y="{y - 5:.1f}" width="10" height="10"/>'
    if node.is_answer:
        # A topic that is an answer shows both signs, one within the other.
        size, fill = (4, ' style="fill: var(--answer)"') if node.is_topic else (7, "")
        signs += (
            f'<path class="sign"{fill} d="M{x + 13:.1f} {y - size:.1f}l{size} {size}'
            f'l{-size} {size}l{-size} {-size}z"/>'
        )
    if not signs:
        signs = f'<circle class="sign" cx="{x + 13:.1f}" cy="{y:.1f}" r="2.5"/>'
    return (
        f'<g class="{css}"><title>{_escaped(node.label)}</title>'
        f'<rect class="box" x="{x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="5"/>{signs}'
        f'<text x="{x + 24:.1f}" y="{y + 4.5:.1f}">'
        f"{escape(shortened(node.label, _NODE_CHARS))}</text></g>"
    )
