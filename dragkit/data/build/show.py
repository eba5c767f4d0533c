"""`data show`: one question of a file as text, and as an HTML page."""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from dragkit.console import output_file, show
from dragkit.data.build.check import require_files
from dragkit.data.build.question_page import question_page
from dragkit.data.build.question_view import QuestionView, ShownFact
from dragkit.data.question_file import Question, QuestionReader, default_id
from dragkit.errors import MissingInputError
from dragkit.observe.drawing import shortened, visible

MAX_OTHERS = 100
_MAX_NAMES, _NAME_WIDTH, _QUESTION_WIDTH = 20, 200, 2000


def show_question(name: str, paths: Sequence[Path], *, html: Path | None = None) -> None:
    """Shows the first question with an id.

    Args:
        name: the id, or the default id of a question without one.
        paths: JSONL, plain or gzip. They are searched in this order.
        html: page to write.

    Raises:
        MissingInputError: a file cannot be read, or no usable line has the id (names ids like it).
        DataError: a file's name ends in .gz, but it is not gzip.
        WriteError: the page or standard output cannot be written.
    """
    require_files(paths)
    target = output_file(html, "Name another file with --html.") if html else nullcontext()
    with target as file:
        path, question = find_question(name, paths)
        view = QuestionView(question)
        show("\n".join(describe(path, view)))
        if file is not None:
            file.write(question_page(view))


def find_question(name: str, paths: Sequence[Path]) -> tuple[Path, Question]:
    """Returns the first question with an id, and its file.

    Raises:
        MissingInputError: no usable line has the id (names ids like it).
    """
    near: list[str] = []
    bad = []
    for path in paths:
        reader = QuestionReader(path)
        unnamed = []
        for question in reader:
            if question.line not in reader.unnamed:
                if question.id == name:
                    return path, question
            elif name.startswith(question.id):
                # Which default id it has is known when all ids of the file are.
                unnamed.append(question)
        for question in unnamed:
            own = default_id(path, question.line, reader.line_of_id)
            if own == name:
                return path, replace(question, id=own)
        near += heapq.nlargest(3, reader.line_of_id, key=lambda known: _likeness(known, name))
        bad += [f"{path}: {len(reader.rejects)}"] if reader.rejects else []
    near = heapq.nlargest(3, near, key=lambda known: _likeness(known, name))
    hints = [f" Ids like it: {', '.join(visible(known) for known in near)}."] if near else []
    if bad:
        hints.append(f" Lines that cannot be used: {', '.join(bad)}. `check` lists them.")
    raise MissingInputError(
        f"no question has the id {name!r} in {', '.join(map(str, paths))}.{''.join(hints)}"
    )


def _likeness(known: str, name: str) -> float:
    # The exact ratio would take about 50 microseconds for each id of a file.
    matcher = difflib.SequenceMatcher(None, known[:100], name[:100])
    return matcher.real_quick_ratio() and matcher.quick_ratio()


def describe(path: Path, view: QuestionView) -> Iterator[str]:
    """Yields the question as lines of text."""
    question, graph = view.question, view.graph
    yield f"id        {visible(question.id)}  ({path}:{question.line})"
    yield f"question  {shortened(question.text, _QUESTION_WIDTH)}"
    yield f"topics    {_names(question.topics, view)}"
    yield f"answers   {_names(question.answers, view)}"
    yield f"graph     {graph.num_nodes:,} entities, {graph.num_facts:,} facts"
    for place, given in enumerate(question.paths[:_MAX_NAMES]):
        steps = " > ".join(shortened(name, _NAME_WIDTH) for name in given)
        yield f"{'' if place else 'paths':<10}{steps}"
    if len(question.paths) > _MAX_NAMES:
        yield f"{'':<10}and {len(question.paths) - _MAX_NAMES:,} more"
    source = {"shortest": " by shortest paths", "paths": " by given paths"}
    yield f"\npositive facts{source.get(graph.label_source, '')}: {len(view.positive):,}"
    yield from _lines(view.positive)
    yield f"\nother facts: {len(view.others):,}"
    yield from _lines(view.others[:MAX_OTHERS])
    if len(view.others) > MAX_OTHERS:
        yield f"  {len(view.others) - MAX_OTHERS:,} facts farther away are not shown"


def _names(names: Sequence[str], view: QuestionView) -> str:
    shown = [
        shortened(name, _NAME_WIDTH) + ("" if name in view.names else " (not in the graph)")
        for name in sorted(names, key=lambda name: name not in view.names)[:_MAX_NAMES]
    ]
    more = [f"and {len(names) - _MAX_NAMES:,} more"] if len(names) > _MAX_NAMES else []
    return "; ".join([*shown, *more]) or "none"


def _lines(facts: Sequence[ShownFact]) -> Iterator[str]:
    """One line per fact, below a line with its hops."""
    last: object = "none yet"
    for fact in facts:
        if fact.hops != last:
            last = fact.hops
            unit = "hop" if last == 1 else "hops"
            yield "  no way from a topic" if last is None else f"  {last} {unit} from a topic"
        mark = "  (evidence)" if fact.is_evidence else ""
        head, relation, tail = (
            shortened(name, _NAME_WIDTH) for name in (fact.head, fact.relation, fact.tail)
        )
        yield f"    {head} --{relation}--> {tail}{mark}"
