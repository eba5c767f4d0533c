"""Writes docs/linking.md: topics that the linker finds in published questions.

    DRAGKIT_DATA=FOLDER python scripts/linking_table.py

`tests/scripts/test_linking_table.py` fails when the page and the figures differ.
"""

from __future__ import annotations

import gzip
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dragkit.data.build.graph import Graph, find_name  # noqa: E402
from dragkit.data.build.linking import EntityLinker  # noqa: E402
from dragkit.data.build.sources import open_source_questions  # noqa: E402
from dragkit.data.question_row import Triple  # noqa: E402

PAGE = Path(__file__).resolve().parents[1] / "docs" / "linking.md"
SETS = {
    "metaqa": ("MetaQA", "metaqa"),
    "webqsp": ("WebQSP", "freebase_pool"),
    "cwq": ("CWQ", "freebase_pool"),
}

HEAD = """# Entity linking

`dragkit.data.build.linking.EntityLinker` finds the entities of a graph that a question names. It
needs no training and no model.

- Letter case and Unicode form (NFC) do not count. Only whole words match. A character of a script
  without spaces is a word of its own.
- At each place the longest name counts, and mentions do not overlap. Of entities with one folded
  name, that spelled as in the question is taken, then that with the most facts, then the first in
  order of the names.
- Names of fewer than 3 characters are left out. A wide character counts twice.
- A lower-case mention of a capitalised name is left out where another mention in the same text has
  its capitals: in "which movie did Ada Reed direct", "movie" is a word and not the entity "Movie".
- `learn_stop_words` leaves out names that stand in at least 1 % of the questions, and in 3: "Film",
  "Country". It needs no topics.
- An alias file adds names: lines of an alias, a tab and an entity. Names go before aliases.

## Precision and recall

Topics found against the topics that the sets give. Length and share of stop words were chosen on
the dev files; the figures are those of the test files. Stop words were learned from the questions
of the train file. `scripts/linking_table.py` writes this table.

"""
COLUMNS = (
    *("set", "questions", "entities", "stop words", "precision", "recall"),
    *("some topic", "all and no other", "in the graph"),
)

TAIL = """
"Some topic" is the share of questions with at least one of their topics found, "all and no other"
that of questions whose mentions are their topics. "In the graph" is the share of given topics that
are entities of the graph, which bounds the recall. Precision and recall count topics over all
questions.

What is missed on the dev files: names that the question spells in another way ("george w bush",
"henry viii", "tupac"; an alias file helps), topics that it names by an adjective ("colombian"),
CWQ's topics that it only describes, and in MetaQA titles of one or two characters ("13", "Go").
"""


class Score(NamedTuple):
    """Counts over the questions of a set."""

    questions: int
    given: int
    present: int
    found: int
    right: int
    some: int
    exact: int


def score(linker: EntityLinker, graph: Graph, questions: list[tuple[str, set[str]]]) -> Score:
    """Counts topics that are given, in the graph, found, and found rightly."""
    given = present = found = right = some = exact = 0
    for text, topics in questions:
        names = {mention.name for mention in linker.link(text)}
        given += len(topics)
        present += sum(find_name(graph.entities, name) is not None for name in topics)
        found += len(names)
        right += len(names & topics)
        some += bool(names & topics)
        exact += names == topics
    return Score(len(questions), given, present, found, right, some, exact)


def read_graph(path: Path) -> Graph:
    """Reads a file of triples, tab-separated."""
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:

        def triples() -> Iterator[Triple]:
            for line in file:
                head, relation, tail = line.rstrip("\n").split("\t")
                yield head, relation, tail

        return Graph.from_triples(triples())


def read_set(path: Path) -> list[tuple[str, set[str]]]:
    """Reads texts and topics of questions."""
    source = open_source_questions(path)
    questions = [(item.question.text, set(item.question.topics)) for item in source]
    source.check()
    return questions


def page(folder: Path) -> str:
    """The whole page."""
    graphs: dict[str, Graph] = {}
    rows = ["| " + " | ".join(COLUMNS) + " |", "| --- " + "| ---: " * (len(COLUMNS) - 1) + "|"]
    for name, (title, kb) in SETS.items():
        graph = graphs.setdefault(kb, read_graph(folder / "kb" / f"{kb}.tsv.gz"))
        train = [text for text, _ in read_set(folder / f"{name}.train.jsonl.gz")]
        test = read_set(folder / f"{name}.test.jsonl.gz")
        for learned in (False, True):
            linker = EntityLinker.of_graph(graph)
            stop_words = linker.learn_stop_words(train) if learned else ()
            s = score(linker, graph, test)
            shares = (
                *(s.right / s.found, s.right / s.given),
                *(s.some / s.questions, s.exact / s.questions, s.present / s.given),
            )
            cells = (title, f"{s.questions:,}", f"{graph.num_entities:,}", str(len(stop_words)))
            rows.append("| " + " | ".join((*cells, *(f"{x:.3f}" for x in shares))) + " |")
    return HEAD + "\n".join(rows) + "\n" + TAIL


if __name__ == "__main__":
    PAGE.write_text(page(Path(os.environ["DRAGKIT_DATA"])), encoding="utf-8")
