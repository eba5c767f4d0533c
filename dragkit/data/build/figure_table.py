"""The figures of several files as one table: a row per figure, a column per file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from dragkit.data.build.figures import LONG_WORDS, SPREADS, Figures
from dragkit.data.gaps import REASONS

_PAGE_WIDTH = 100
# Label, name of the count, and the name of the count that it is a fraction of, if any.
_COUNTS = (
    ("rows", "rows", ""),
    ("unusable rows", "unusable_rows", "rows"),
    ("questions", "questions", ""),
    ("- without text", "empty_question", "questions"),
    ("- without facts", "empty_graph", "questions"),
    ("- without a topic", "no_topic", "questions"),
    ("- without an answer", "no_answer", "questions"),
    ("- topics taken from paths", "topics_from_paths", "questions"),
    ("- text as on an earlier line", "repeated_texts", "questions"),
    ("- text and facts as on an earlier line", "repeated_questions", "questions"),
    ("- an answer in the question", "with_answer_in_question", "questions"),
    (f"- more than {LONG_WORDS} words", "long_questions", "questions"),
    ("- a topic in the graph", "with_topic_in_graph", "questions"),
    ("- an answer in the graph (ceiling)", "with_answer_in_graph", "questions"),
    ("- all answers in the graph", "with_all_answers_in_graph", "questions"),
    ("topics", "topics", ""),
    ("- in the graph", "topics_in_graph", "topics"),
    ("answers", "answers", ""),
    ("- in the graph", "answers_in_graph", "answers"),
    ("- in the graph in another form", "answers_in_another_form", "answers"),
    ("relations", "relations", ""),
    ("- same words as another's", "relations_with_shared_words", "relations"),
    ("repeated triples", "duplicate_triples", ""),
    ("positive facts", "positive_facts", ""),
    ("labelled by shortest paths", "labels_shortest", "questions"),
    ("labelled by given paths", "labels_paths", "questions"),
    ("questions without a positive fact", "labels_none", "questions"),
)


def figure_rows(files: Sequence[Figures]) -> list[list[str]]:
    """The table without its head: a label and one text per file in each row."""

    rows = [
        [label, *(_count(f.counts[name], f.counts[of] if of else None) for f in files)]
        for label, name, of in _COUNTS
    ]
    for reason, text in REASONS.items():
        cells = [_count(f.gaps.counts[reason], f.counts["questions"]) for f in files]
        if any(f.gaps.counts[reason] for f in files):
            rows.append([f"- {text.format('').strip()}", *cells])
    empty = [""] * len(files)
    rows.append(["hops from a topic to an answer", *empty])
    for hops in sorted({hops for f in files for hops in f.hops}, key=lambda n: (n < 0, n)):
        cells = [_count(f.hops[hops], f.counts["questions"]) for f in files]
        rows.append(["- no path" if hops < 0 else f"- {hops}", *cells])
    rows.append(["of a question: min/median/p95/max", *empty])
    for name in SPREADS:
        rows.append([f"- {name.replace('_', ' ')}", *(_spread(f, name) for f in files)])
    return rows


def _count(value: int, whole: int | None) -> str:
    if not whole or not value:
        return f"{value:,}"
    return f"{value:,} ({value / whole:.1%})"


def _spread(figures: Figures, name: str) -> str:
    spread = figures.spread(name)
    return "/".join(f"{x:,.10g}" for x in spread.values()) if spread else "-"


def column_names(files: Sequence[Figures]) -> list[str]:
    """The shortest end of each file's path that no other file's path has."""
    parts = [figures.path.parts for figures in files]
    names = []
    for path in parts:
        depth = 1
        while any(path != other and path[-depth:] == other[-depth:] for other in parts):
            depth += 1
        names.append(os.path.join(*path[-depth:]))
    return names


def text_tables(files: Sequence[Figures]) -> Iterator[str]:
    """Yields plain tables of as many columns as a page is wide."""
    names, rows = column_names(files), figure_rows(files)
    label_width = max(len(row[0]) for row in rows)
    widths = [
        max(len(row[column + 1]) for row in [["", *names], *rows]) for column in range(len(files))
    ]
    start = 0
    while start < len(files):
        stop, width = start + 1, label_width + 2 + widths[start]
        while stop < len(files) and (width := width + 2 + widths[stop]) <= _PAGE_WIDTH:
            stop += 1
        lines = [
            "  ".join(
                [
                    row[0].ljust(label_width),
                    *(row[c + 1].rjust(widths[c]) for c in range(start, stop)),
                ]
            ).rstrip()
            for row in [["", *names], *rows]
        ]
        yield "\n".join(lines)
        start = stop


def markdown_table(files: Sequence[Figures]) -> str:
    """One Markdown table."""
    names = [name.replace("|", r"\|") for name in column_names(files)]
    head = ["", *names]
    lines = [head, ["---", *["---:"] * len(names)], *figure_rows(files)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
