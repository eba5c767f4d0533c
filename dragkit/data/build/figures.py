"""Figures of a file of questions: what it holds, and what a model can learn from it."""

from __future__ import annotations

import re
import sys
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dragkit.data.build.overlap import Keys, num_repeated
from dragkit.data.gaps import LabelGaps, describe_unread, folded, other_forms
from dragkit.data.labels import hops_from
from dragkit.data.question_file import Question, QuestionReader
from dragkit.data.relations import RelationVocab
from dragkit.data.subgraph import Subgraph, build_subgraph
from dragkit.errors import DataError

# Numbers of each question whose distribution is of interest.
SPREADS = ("facts", "entities", "relations", "positive_facts", "answers")
# The sentence encoder reads 128 tokens, and a word has at least one.
LONG_WORDS = 128
_WORD = re.compile(r"\w+")


def _words(text: str) -> str:
    """The words of a text in one form, each between spaces."""
    return f" {' '.join(_WORD.findall(folded(text)))} "


def answer_in_question(question: Question) -> bool:
    """Whether the words of an answer follow one another in the question."""
    text = _words(question.text)
    return any(words.strip() and words in text for words in map(_words, question.answers))


def nearest_answer(graph: Subgraph) -> int:
    """Hops from the nearest topic to the nearest answer, -1 without a path between the two."""
    if not len(graph.topics) or not len(graph.answers):
        return -1
    hops = hops_from(graph.head, graph.tail, graph.num_nodes, graph.topics, graph.answers)
    reached = hops[graph.answers]
    return int(min(reached[reached >= 0], default=-1))


class Figures:
    """Counts the usable questions of a file one by one, with the values of `SPREADS`.

    Args:
        path: the file, for its name.

    Attributes:
        counts: numbers of questions and of other things by name.
        values: one number per question, by name.
        hops: number of questions by `nearest_answer`.
        gaps: why questions have no positive fact.
        keys: what other files are compared by.
        unread: keys of the file that are not read and may mean one that its questions lack.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.values = {name: array("q") for name in SPREADS}
        self.hops: Counter[int] = Counter()
        self.gaps = LabelGaps()
        self.keys = Keys()
        self.unread = ""
        self._vocab = RelationVocab()

    def add(self, question: Question, *, has_id: bool) -> None:
        """Counts one question. `has_id` tells whether the file gives its id."""
        graph = build_subgraph(question, self._vocab)
        num_relations = len(np.unique(graph.relation))
        positive, label = int(graph.label.sum()), f"labels_{graph.label_source}"
        values = (graph.num_facts, graph.num_nodes, num_relations, positive, len(question.answers))
        for name, value in zip(SPREADS, values, strict=True):
            self.values[name].append(value)
        for name, amount in (
            ("answers", len(question.answers)),
            ("answers_in_graph", len(graph.answers)),
            ("answers_in_another_form", sum(1 for _ in other_forms(question, graph))),
            ("with_answer_in_graph", len(graph.answers) > 0),
            ("with_all_answers_in_graph", 0 < len(question.answers) == len(graph.answers)),
            ("with_answer_in_question", answer_in_question(question)),
            ("topics", len(question.topics)),
            ("topics_in_graph", len(graph.topics)),
            ("with_topic_in_graph", len(graph.topics) > 0),
            ("long_questions", len(question.text.split()) > LONG_WORDS),
            ("positive_facts", positive),
            (label, 1),
        ):
            self.counts[name] += amount
        self.hops[nearest_answer(graph)] += 1
        self.gaps.add(question, graph)
        self.keys.add(question, has_id=has_id)

    def close(self, reader: QuestionReader) -> None:
        """Adds what the reader counted, and what all questions together show."""
        texts = Counter(self._vocab.texts()[::2])
        self.counts.update(
            reader.notes,
            rows=reader.rows,
            unusable_rows=len(reader.rejects),
            relations=len(self._vocab),
            relations_with_shared_words=sum(n for n in texts.values() if n > 1),
            repeated_texts=num_repeated(self.keys.text),
            repeated_questions=num_repeated(self.keys.text_and_graph),
        )
        self.unread = describe_unread(
            [(key, field, count) for (key, field), count in reader.unread.items()]
        )

    def spread(self, name: str) -> dict[str, float] | None:
        """Minimum, median, 95th percentile and maximum of some values, None without questions."""
        values = np.frombuffer(self.values[name], dtype=np.int64)
        if not len(values):
            return None
        points = np.quantile(values, (0, 0.5, 0.95, 1)).tolist()
        return dict(zip(("min", "median", "p95", "max"), points, strict=True))

    def document(self) -> dict[str, object]:
        """All figures as JSON-ready data."""
        hops = {("no_path" if n < 0 else str(n)): self.hops[n] for n in sorted(self.hops)}
        return {
            "file": str(self.path),
            "counts": dict(sorted(self.counts.items())),
            "hops_to_nearest_answer": hops,
            "per_question": {name: self.spread(name) for name in SPREADS},
            "without_positive_fact": dict(self.gaps.counts),
            "examples": self.gaps.examples,
            "keys_not_read": self.unread,
        }


def read_figures(path: Path) -> tuple[Figures, DataError | None]:
    """Counts all usable questions of a file in one pass and in bounded memory.

    Returns:
        The figures, and an error that lists all unusable rows if there are any.

    Raises:
        MissingInputError: the file does not exist or cannot be read.
    """
    reader, figures, error = QuestionReader(path), Figures(path), None
    try:
        with tqdm(desc=path.name, unit=" questions", disable=not sys.stderr.isatty()) as bar:
            for question in reader:
                figures.add(question, has_id=question.line not in reader.unnamed)
                bar.update()
        reader.check()
    except DataError as found:
        error = found
    figures.close(reader)
    return figures, error
