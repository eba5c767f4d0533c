"""Recognises the layout of a file or a folder of questions by its content."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dragkit.data.build.nsm import nsm_questions
from dragkit.data.build.record_questions import FIELDS, USUAL_NAMES, Reading, record_questions
from dragkit.data.build.records import (
    Container,
    Rows,
    container_of,
    hub_splits,
    starts,
)
from dragkit.data.build.source_question import Item, split_of_name
from dragkit.data.build.text_layouts import (
    is_metaqa,
    is_pathquestion,
    metaqa_questions,
    pathquestion_questions,
)
from dragkit.data.build.webqsp import is_webqsp, webqsp_questions
from dragkit.data.lines import open_source
from dragkit.errors import ConfigError, DataError, MissingInputError

LAYOUTS: Mapping[str, str] = {
    "rog": "RoG-WebQSP and RoG-CWQ (columns question, answer, q_entity, graph)",
    "heuristics": "questions with their triples (docs/data-format.md)",
    "columns": "questions with named columns",
    "metaqa": "MetaQA (question with [topic], tab, answers)",
    "pathquestion": "PathQuestion (question, answer(answers/), topic#relation#answer)",
    "nsm": "NSM, GraftNet and ReaRev (*_simple.json with entities.txt and relations.txt)",
    "webqsp": "WebQSP's own JSON (Questions, Parses, Answers)",
}
_REQUIRED = {"rog": ("question", "triples"), "heuristics": ("question", "triples")}
HUB = "hf:"
# Files of these names in a folder hold no questions.
_OTHER_FILES = re.compile(r"(?i)(readme|licen[cs]e|dataset_infos?|dataset_dict|state)\b|.*qtype")
_METAQA_FOLDERS = (".", "vanilla", "*-hop/vanilla", "*-hop")


class Part(NamedTuple):
    """One file of a source, or one split of a hub data set, and its questions."""

    file: Path
    items: Callable[[], Iterator[Item]]


class Found(NamedTuple):
    """A source: the name and description of its layout, and its parts in order."""

    layout: str
    description: str
    parts: tuple[Part, ...]


def find_layout(path: str | Path, layout: str | None, reading: Reading) -> Found:
    """Recognises a source. `open_source_questions` describes arguments and errors."""
    if layout is not None and layout not in LAYOUTS:
        raise ConfigError(f"the layout {layout!r} is unknown. There are: {', '.join(LAYOUTS)}.")
    if wrong := sorted(set(reading.columns) - set(FIELDS)):
        raise ConfigError(f"columns: no field {wrong[0]!r}. The fields are: {', '.join(FIELDS)}.")
    if str(path).startswith(HUB):
        return _hub(str(path).removeprefix(HUB), layout, reading)
    path = Path(path)
    files = _question_files(path) if path.is_dir() else [path]
    found = [_file(file, layout, reading) for file in files]
    names = {name for name, _, _ in found}
    if len(names) > 1:
        listed = "\n".join(f"{file}: {item[0]}" for file, item in zip(files, found, strict=True))
        raise DataError(f"{path}: files of several layouts. Name one of them.\n{listed}")
    name, how, _ = found[0]
    description = LAYOUTS[name] + (f", {how}" if how else "")
    return Found(name, description, tuple(part for _, _, part in found))


def _question_files(folder: Path) -> list[Path]:
    """Returns the files of a folder that hold questions, train before dev before test.

    Raises:
        MissingInputError: there is none.
    """
    inner = folder / "data" if (folder / "data").is_dir() else folder
    simple = [*folder.glob("*_simple.json*")]
    metaqa = next((f for g in _METAQA_FOLDERS if (f := [*folder.glob(f"{g}/qa_*.txt")])), [])
    files = simple or metaqa or [*folder.iterdir(), *(inner.iterdir() if inner != folder else ())]
    files = [
        file
        for file in files
        if file.is_file()
        and not file.name.startswith(".")
        and split_of_name(file.name)
        and not _OTHER_FILES.match(file.name)
    ]
    if not files:
        raise MissingInputError(
            f"{folder}: a folder without files of questions. Their names hold train, dev, valid, "
            "validation or test, as in train.jsonl or data/test-00000-of-00001.parquet."
        )
    order = {"train": 0, "dev": 1, "test": 2}
    return sorted(files, key=lambda f: (order[split_of_name(f.name) or ""], str(f)))


def _hub(name: str, layout: str | None, reading: Reading) -> Found:
    name_of_layout = layout or "rog"
    parts = []
    for split, rows in hub_splits(name).items():
        file = Path(f"{HUB}{name}/{split}")
        word = split_of_name(split) or split
        parts.append(Part(file, partial(_records, rows, file, name_of_layout, reading, word)))
    return Found(name_of_layout, f"{LAYOUTS[name_of_layout]}, Hugging Face hub", tuple(parts))


def _file(path: Path, layout: str | None, reading: Reading) -> tuple[str, str, Part]:
    """Returns name of the layout, how the file holds records, and the part.

    Raises:
        DataError: the layout is not recognised.
    """
    with open_source(path):
        pass
    container = container_of(path, has_header=reading.has_header)
    layout = layout or _recognised(path, container, reading)
    read: Callable[[], Iterator[Item]]
    if layout == "metaqa":
        read = partial(metaqa_questions, path)
    elif layout == "pathquestion":
        read = partial(pathquestion_questions, path)
    elif layout == "nsm":
        read = partial(nsm_questions, path, reading)
    elif layout == "webqsp":
        read = partial(webqsp_questions, path, reading)
    elif layout is not None and container is not None:
        word, table = split_of_name(path.name), bool(container.separator)
        read = partial(_records, container.rows, path, layout, reading, word, is_table=table)
        return layout, container.name, Part(path, read)
    else:
        known = "\n".join(f"  {name}: {text}" for name, text in LAYOUTS.items())
        raise DataError(
            f"{path}: the layout is not recognised. A table or JSON lines need a column for the "
            f"question, called question or stated as such. The layouts are\n{known}"
        )
    return layout, "", Part(path, read)


def _recognised(path: Path, container: Container | None, reading: Reading) -> str | None:
    start = starts(path)
    if is_webqsp(start):
        return "webqsp"
    columns = set(container.columns()) if container is not None else set()
    has_question = bool(columns & set(USUAL_NAMES["question"]))
    if not has_question and not reading.columns:
        # The first line may be damaged, so one of the first decides.
        lines = start.decode("utf-8", "replace").splitlines()[:100]
        cells = [line.split("\t") for line in lines if line.strip()]
        for name, is_line in (("pathquestion", is_pathquestion), ("metaqa", is_metaqa)):
            if any(map(is_line, cells)):
                return name
        return None
    if "subgraph" in columns and has_question:
        return "nsm"
    if container is None:
        return None
    if columns & set(USUAL_NAMES["triples"]):
        return "rog" if "graph" in columns else "heuristics"
    return "columns"


def _records(
    rows: Callable[[], Rows],
    file: Path,
    layout: str,
    reading: Reading,
    split: str | None,
    *,
    is_table: bool = False,
) -> Iterator[Item]:
    required = _REQUIRED.get(layout, ("question",))
    return record_questions(rows(), file, required, reading, split=split, is_table=is_table)
