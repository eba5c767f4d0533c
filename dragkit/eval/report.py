"""Means over questions with their denominators, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dragkit.data.tokens import ANSWER_DELIMITER
from dragkit.eval.metrics import METRIC_VERSION, parse_answers, score_question

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class QuestionRecord:
    """The scores of one question.

    Attributes:
        question_id: names the question in messages.
        scores: answer metrics; every question of a report has the same names.
        num_golds: gold answers that the question has.
        num_predictions: distinct answers in the output; 0 for an empty or failed generation.
        answer_in_graph: whether some gold is an entity of the graph; None if not known.
        retrieval: further metrics that some questions may lack, such as `retrieval-recall`,
            which has no meaning where no fact is labelled.
    """

    question_id: str
    scores: Mapping[str, float]
    num_golds: int
    num_predictions: int
    answer_in_graph: bool | None = None
    retrieval: Mapping[str, float] = field(default_factory=dict)


def score_text(
    question_id: str,
    text: str,
    golds: Sequence[str],
    *,
    question: str = "",
    answer_in_graph: bool | None = None,
    retrieval: Mapping[str, float] | None = None,
    delimiter: str = ANSWER_DELIMITER,
) -> QuestionRecord:
    """Parse and score one generated text; a failed generation is the empty text.

    Args:
        question_id: names the question in messages.
        text: the generated text.
        golds: the gold answers.
        question: text of the question, read by the subgraphrag family only.
        answer_in_graph: whether some gold is an entity of the graph; None if not known.
        retrieval: retrieval metrics of the question, where it has any.
        delimiter: what separates answers on a line, see `parse_answers`.

    Raises:
        ValueError: `golds` is one text instead of a list.
    """
    # Repeats are kept because the published rog precision pays for them; no other score does.
    predictions = parse_answers(text, delimiter, keep_repeats=True)
    return QuestionRecord(
        question_id=question_id,
        scores=score_question(predictions, golds, question=question),
        num_golds=len(golds),
        num_predictions=len(set(predictions)),
        answer_in_graph=answer_in_graph,
        retrieval=dict(retrieval or {}),
    )


@dataclass(frozen=True, slots=True)
class Report:
    """Macro means, each with the number of questions in it.

    Attributes:
        counts: `asked`; `answerable_in_subgraph`, None where any question left it unknown;
            `no_gold`, questions without a gold answer; `scored`, always equal to `asked`;
            `empty_predictions`.
        means: metric to mean over its questions, as a fraction. Empty if none were asked.
        num_scored: metric to questions in its mean; `asked` for every answer metric.
    """

    counts: Mapping[str, int | None]
    means: Mapping[str, float]
    num_scored: Mapping[str, int]

    def families(self) -> dict[str, int]:
        """Return for each family (`strict`, `rog`, ...) the questions scored by its metrics."""
        sizes: dict[str, int] = {}
        for name, num in self.num_scored.items():
            family = name.partition("-")[0]
            sizes[family] = max(num, sizes.get(family, 0))
        return sizes

    def to_dict(self) -> dict[str, object]:
        """Return the report as plain values, with the versions that say what the names mean."""
        return {
            "schema_version": SCHEMA_VERSION,
            "metric_version": METRIC_VERSION,
            "counts": dict(self.counts),
            "families": self.families(),
            "metrics": {
                name: {"mean": mean, "scored": self.num_scored[name]}
                for name, mean in self.means.items()
            },
        }

    def to_table(self) -> str:
        """Return an aligned text table: means in percent (`facts-*`: counts), then the counts."""
        rows = [("metric", "percent", "scored")]
        for name, mean in self.means.items():
            # Counts are means too, but not shares.
            shown = f"{mean:.2f}" if name.startswith("facts-") else f"{100 * mean:.2f}"
            rows.append((name, shown, str(self.num_scored[name])))
        counts = [(n, "unknown" if c is None else str(c), "") for n, c in self.counts.items()]
        labels = max(len(row[0]) for row in rows + counts)
        numbers = max(len(row[1]) for row in rows + counts)
        last = max(len(row[2]) for row in rows)
        lines = [f"{a:<{labels}}  {b:>{numbers}}  {c:>{last}}".rstrip() for a, b, c in rows]
        lines += ["", *(f"{a:<{labels}}  {b:>{numbers}}" for a, b, _ in counts)]
        return "\n".join(lines) + "\n"


def aggregate(records: Iterable[QuestionRecord]) -> Report:
    """Average the questions of a split; none is left out of an answer metric.

    Args:
        records: one for each question asked, failed and unanswerable ones included.

    Raises:
        ValueError: a question lacks an answer metric that others have, or a value is not finite.
    """
    rows = list(records)
    values: dict[str, list[float]] = {name: [] for name in (rows[0].scores if rows else ())}
    answer_names = set(values)
    for row in rows:
        if set(row.scores) != answer_names:
            odd = ", ".join(sorted(set(row.scores) ^ answer_names))
            raise ValueError(
                f"question {row.question_id!r}: every question needs the same answer metrics, "
                f"but these differ from the first question: {odd}"
            )
        if both := answer_names & set(row.retrieval):
            raise ValueError(f"question {row.question_id!r}: metrics given twice: {sorted(both)}")
        for name, value in (*row.scores.items(), *row.retrieval.items()):
            if not math.isfinite(value):
                raise ValueError(f"question {row.question_id!r}: {name} is {value}, not a number")
            values.setdefault(name, []).append(float(value))
    in_graph = [row.answer_in_graph for row in rows]
    counts = {
        "asked": len(rows),
        "answerable_in_subgraph": None if None in in_graph else sum(map(bool, in_graph)),
        "no_gold": sum(row.num_golds == 0 for row in rows),
        "scored": len(rows),
        "empty_predictions": sum(row.num_predictions == 0 for row in rows),
    }
    # fsum makes the mean independent of the order of the questions.
    means = {name: math.fsum(column) / len(column) for name, column in values.items()}
    num_scored = {name: len(column) for name, column in values.items()}
    return Report(counts=counts, means=means, num_scored=num_scored)
