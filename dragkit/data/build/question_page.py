"""A question as a self-contained HTML page: its graph drawn, and its facts as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from dragkit.data.build.question_view import QuestionView, ShownFact
from dragkit.data.relations import relation_text
from dragkit.observe.drawing import Edge, Node, draw_graph, visible

# More facts than these are too many to be followed by eye, or to be scrolled through.
MAX_DRAWN, MAX_LISTED = 60, 1000
_MAX_NAMES, _MAX_NAME, _MAX_QUESTION = 50, 300, 2000

_STYLE = """\
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #ffffff; --line: #d0d0d0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --paper: #16181b; --line: #43474d; } }
body { margin: 0 auto; padding: 1rem; max-width: 100rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; line-height: 1.3; }
h2 { font-size: 1.05rem; margin-top: 2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; }
dt { font-weight: bold; }
dd { margin: 0; }
figure { margin: 0; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
.scroll svg { display: block; }
figcaption { padding: .5rem 0; font-size: .875rem; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; font-size: .875rem; }
th, td { text-align: start; vertical-align: top; padding: .25rem .5rem;
  border-bottom: 1px solid var(--line); }
th:first-child { width: 2.5rem; }
"""
_LEGEND = (
    "A square marks a topic and a diamond an answer. Thick lines are positive facts, dashed lines "
    "are other facts. An arrow points from head to tail. Columns are hops from the topics. Point "
    "at a name that is cut to read more of it."
)


def question_page(view: QuestionView) -> str:
    """Returns the page as HTML."""
    question, drawn = view.question, drawn_facts(view)
    left_out = len(view.facts) - len(drawn)
    caption = f"{_LEGEND} {left_out:,} facts farther away are not drawn." if left_out else _LEGEND
    picture = (
        f'<figure><div class="scroll" tabindex="0">{_picture(view, drawn)}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
        if drawn
        else "<p>The question has no facts.</p>"
    )
    title = _name(question.text, _MAX_QUESTION) or "(no text)"
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_name(question.id)}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>",
            f"<h1><bdi>{title}</bdi></h1>",
            "<dl>",
            f"<dt>id</dt><dd>{_name(question.id)}, line {question.line}</dd>",
            *_names("topics", question.topics, view),
            *_names("answers", question.answers, view),
            f"<dt>facts</dt><dd>{len(view.facts):,}, positive: {len(view.positive):,}</dd>",
            "</dl>",
            picture,
            *_table("Positive facts", view.positive),
            *_table("Other facts", view.others),
            "</body>\n</html>\n",
        ]
    )


def drawn_facts(view: QuestionView) -> list[ShownFact]:
    """The positive facts and the nearest others, as many as a drawing holds."""
    return [*view.positive, *view.others][:MAX_DRAWN]


def _picture(view: QuestionView, facts: Sequence[ShownFact]) -> str:
    graph = view.graph
    topics, answers = set(graph.topics.tolist()), set(graph.answers.tolist())
    farthest = max((int(view.hops[row]) for fact in facts for row in fact.rows), default=-1)
    columns: dict[int, int] = {}
    for fact in facts:
        for row, beyond in zip(fact.rows, (1, 2), strict=True):
            # What no way leads to stands at the right, heads before tails.
            hops = int(view.hops[row])
            columns.setdefault(row, hops if hops >= 0 else farthest + beyond)
    place = {row: i for i, row in enumerate(columns)}
    nodes = [
        Node(graph.names[row], column, is_topic=row in topics, is_answer=row in answers)
        for row, column in columns.items()
    ]
    edges = [
        Edge(place[f.rows[0]], place[f.rows[1]], relation_text(f.relation), f.is_positive)
        for f in facts
    ]
    return draw_graph(nodes, edges, title=f"Graph of the question: {view.question.text}")


def _name(text: str, limit: int = _MAX_NAME) -> str:
    """A text in HTML, without characters that act, and cut where it is very long."""
    end = f"… ({len(text):,} characters)" if len(text) > limit else ""
    return escape(visible(text[:limit])) + end


def _names(label: str, names: Sequence[str], view: QuestionView) -> Iterable[str]:
    yield f"<dt>{label}</dt>"
    shown = [
        f"<bdi>{_name(name)}</bdi>" + ("" if name in view.names else " (not in the graph)")
        for name in sorted(names, key=lambda name: name not in view.names)[:_MAX_NAMES]
    ]
    more = [f"and {len(names) - _MAX_NAMES:,} more"] if len(names) > _MAX_NAMES else []
    yield f"<dd>{'; '.join([*shown, *more]) or 'none'}</dd>"


def _table(title: str, facts: Sequence[ShownFact]) -> Iterable[str]:
    """A heading and a table of facts. Facts beyond a limit are counted only."""
    yield f"<h2>{title}: {len(facts):,}</h2>"
    if not facts:
        return
    yield "<table><thead><tr><th>hops</th><th>head</th><th>relation</th><th>tail</th></tr></thead>"
    for fact in facts[:MAX_LISTED]:
        cells = (
            "-" if fact.hops is None else str(fact.hops),
            *(f"<bdi>{_name(name)}</bdi>" for name in (fact.head, fact.relation, fact.tail)),
        )
        mark = " (evidence)" if fact.is_evidence else ""
        yield f"<tr><td>{'</td><td>'.join(cells)}{mark}</td></tr>"
    yield "</table>"
    if len(facts) > MAX_LISTED:
        yield f"<p>{len(facts) - MAX_LISTED:,} facts farther away are not listed.</p>"
