"""Questions of WebQSP's own JSON, with topics, answers and chains of every parse."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from dragkit.data.build.record_questions import Reading
from dragkit.data.build.source_question import (
    Item,
    SourceProblem,
    SourceQuestion,
    group_of_id,
    split_of_name,
)
from dragkit.data.lines import BROKEN_GZIP, open_source
from dragkit.data.question_file import MAX_LINE_BYTES, Question

# The object that holds the list may name its version first.
_BEGINS = re.compile(rb'\s*\{(?:\s*"\w+"\s*:\s*"[^"]*"\s*,)*\s*"Questions"\s*:\s*\[')


class _Answer(msgspec.Struct):
    AnswerArgument: str
    EntityName: str | None = None


class _Parse(msgspec.Struct):
    TopicEntityMid: str | None = None
    TopicEntityName: str | None = None
    InferentialChain: list[str] | None = None
    Answers: list[_Answer] = []


class _Question(msgspec.Struct):
    QuestionId: str
    RawQuestion: str
    Parses: list[_Parse] = []


class _File(msgspec.Struct):
    Questions: list[msgspec.Raw]


def is_webqsp(start: bytes) -> bool:
    """Whether the first bytes of a file are those of WebQSP's JSON."""
    return _BEGINS.match(start) is not None


def webqsp_questions(path: Path, reading: Reading) -> Iterator[Item]:
    """Yields the questions of `WebQSP.train.json` or `WebQSP.test.json`.

    Topics, answers and chains are those of all parses. An answer is its name, or its value where it
    is none of the entities. The file is one object, of 64 MB at most.
    """
    data = b""
    with open_source(path) as stream:
        try:
            data = stream.read(MAX_LINE_BYTES + 1)
        except BROKEN_GZIP as error:
            reason = f"the gzip data is truncated or damaged: {error}"
            yield SourceProblem(path, 1, "$", reason)
            return
    if len(data) > MAX_LINE_BYTES:
        yield SourceProblem(path, 1, "$", f"more than {MAX_LINE_BYTES / 1e6:g} MB")
        return
    try:
        data.decode("utf-8")
        rows = msgspec.json.decode(data, type=_File).Questions
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        yield SourceProblem(path, line, "$", f"not UTF-8: {error.reason} (byte {error.start})")
        return
    except msgspec.DecodeError as error:
        reason = f"not valid JSON: {str(error).removeprefix('JSON is malformed: ')}"
        yield SourceProblem(path, 1, "$", reason)
        return
    line, position = 1, 0
    for index, raw in enumerate(rows):
        text = bytes(raw)
        begin = data.index(text, position)
        line += data.count(b"\n", position, begin)
        position = begin
        at = f"$.Questions[{index}]"
        try:
            row = msgspec.json.decode(text, type=_Question)
        except msgspec.DecodeError as error:
            reason, _, inner = str(error).partition(" - at `$")
            yield SourceProblem(path, line, at + inner.rstrip("`"), reason)
            continue
        yield SourceQuestion(
            _question(row, line, reading.entity_ids),
            split_of_name(path.name),
            group_of_id(row.QuestionId) or row.QuestionId,
        )


def _question(row: _Question, line: int, entity_ids: bool) -> Question:
    topics: list[str | None] = []
    answers: list[str] = []
    chains: list[tuple[str, ...]] = []
    for parse in row.Parses:
        topics.append(parse.TopicEntityMid if entity_ids else parse.TopicEntityName)
        for answer in parse.Answers:
            name = None if entity_ids else answer.EntityName
            answers.append(name or answer.AnswerArgument)
        if parse.InferentialChain:
            chains.append(tuple(parse.InferentialChain))
    return Question(
        row.QuestionId,
        row.RawQuestion,
        (),
        tuple(dict.fromkeys(topic for topic in topics if topic)),
        (),
        tuple(dict.fromkeys(answer for answer in answers if answer)),
        line,
        relation_paths=tuple(dict.fromkeys(chains)),
    )
