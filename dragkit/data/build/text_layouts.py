"""Questions of MetaQA and PathQuestion, whose text files have a layout of their own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from dragkit.data.build.records import text_cells
from dragkit.data.build.source_question import Item, SourceProblem, SourceQuestion, split_of_name
from dragkit.data.question_file import Question, default_id

# A name may hold brackets of its own, so the outermost ones count.
_TOPIC = re.compile(r"\[(.+)\]")
_HOPS = re.compile(r"(\d)-?hop")
_END = "<end>"


def is_metaqa(cells: list[str]) -> bool:
    """Whether a line is one of MetaQA: a question with its topic in brackets, and the answers."""
    return len(cells) == 2 and _TOPIC.search(cells[0]) is not None


def metaqa_questions(path: Path) -> Iterator[Item]:
    """Yields the questions of a file of MetaQA: `question with [topic]`, a tab, `answer|answer`.

    The brackets go. The type of each question is read from `qa_SPLIT_qtype.txt`, where this stands
    in the file's folder or in the one above.
    """
    split = split_of_name(path.name)
    hops = next((int(m[1]) for part in reversed(path.parts) if (m := _HOPS.search(part))), None)
    types = _question_types(path, split)
    kinds: list[str] | None = None
    if types is not None:
        kinds = []
        for item in text_cells(types, "\n"):
            if isinstance(item, SourceProblem):
                yield item
                return
            kinds.append(item[1][0])
    count = number = 0
    for item in text_cells(path, "\t"):
        count += 1
        if isinstance(item, SourceProblem):
            yield item
            continue
        number, cells = item
        if not is_metaqa(cells):
            reason = "expected a question with its topic in square brackets, a tab, and answers"
            yield SourceProblem(path, number, "$", reason)
            continue
        text, answers = cells
        topic = _TOPIC.search(text)[1]  # type: ignore[index]
        name = default_id(path, number)
        if hops is not None and split is not None:
            name = f"metaqa-{hops}-hop-{split}-{number}"
        extra: dict[str, object] = {} if hops is None else {"hops": hops}
        if kinds is not None and count <= len(kinds):
            extra["qtype"] = kinds[count - 1]
        question = Question(
            name,
            _TOPIC.sub(r"\1", text, count=1),
            (),
            (topic,),
            (),
            tuple(dict.fromkeys(answer for answer in answers.split("|") if answer)),
            number,
        )
        yield SourceQuestion(question, split, None, extra)
    if kinds is not None and count != len(kinds):
        reason = f"{len(kinds)} types for the {count} questions of {path}"
        yield SourceProblem(types or path, min(count, len(kinds)) + 1, "$", reason)


def _question_types(path: Path, split: str | None) -> Path | None:
    if split is None:
        return None
    name = f"qa_{split}_qtype.txt"
    return next((p for f in (path.parent, path.parent.parent) if (p := f / name).is_file()), None)


def is_pathquestion(cells: list[str]) -> bool:
    """Whether a line is one of PathQuestion: question, `answer(answers/)` and the path."""
    return (
        len(cells) == 3
        and cells[1].endswith(")")
        and "(" in cells[1]
        and len(_path_names(cells[2])) % 2 == 1
        and cells[2].count("#") >= 2
    )


def pathquestion_questions(path: Path) -> Iterator[Item]:
    """Yields the questions of a file of PathQuestion or PathQuestion-Large.

    A line holds the question, `answer(answer/answer/)` and `topic#relation#entity#...`, with tabs
    between them. `#<end>#answer` may follow. Names stay as they are, underscores included. All
    wordings of a topic and its chain of relations are one group.
    """
    for item in text_cells(path, "\t"):
        if isinstance(item, SourceProblem):
            yield item
            continue
        number, cells = item
        if not is_pathquestion(cells):
            reason = "expected question, answer(answers/) and topic#relation#...#answer, with tabs"
            yield SourceProblem(path, number, "$", reason)
            continue
        text, answer_set, walk = cells
        names = _path_names(walk)
        entities, relations = tuple(names[::2]), tuple(names[1::2])
        if not all(names):
            yield SourceProblem(path, number, "$[2]", "the path holds an empty name")
            continue
        question = Question(
            default_id(path, number),
            text.strip(),
            (),
            entities[:1],
            (entities,),
            _answers(answer_set, entities[-1]),
            number,
            relation_paths=(relations,),
        )
        group = "#".join((entities[0], *relations))
        yield SourceQuestion(question, split_of_name(path.name), group, {"hops": len(relations)})


def _path_names(walk: str) -> list[str]:
    """Returns entities and relations in turn, without the mark of the end."""
    names = walk.split("#")
    return names[: names.index(_END)] if _END in names else names


def _answers(cell: str, last: str) -> tuple[str, ...]:
    """Returns the names of `answer(answer/answer/)`. The answer may hold brackets itself."""
    begin = len(last) if cell.startswith(f"{last}(") else cell.index("(")
    return tuple(dict.fromkeys(name for name in cell[begin + 1 : -1].split("/") if name))
