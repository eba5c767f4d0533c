"""Means over questions with their denominators, as a text table and as JSON values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dragkit.eval.metrics import METRIC_VERSION, parse_answers, score_question

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class QuestionRecord:
    """The scores of one question.

    Attributes:
        question_id: id of the question, for messages.
        scores: answer metrics. Every question of a report has the same ones.
        num_golds: number of gold answers.
        num_predictions: number of distinct answers in the output, 0 for a failed generation.
        answer_in_graph: whether some gold answer is an entity of the graph, None if unknown.
        retrieval: metrics that some questions may lack. `retrieval-recall`, for example, is
            undefined without a labelled fact.
        num_left_out: number of facts that were chosen for the prompt and found no room in it.
    """

    question_id: str
    scores: Mapping[str, float]
    num_golds: int
    num_predictions: int
    answer_in_graph: bool | None = None
    retrieval: Mapping[str, float] = field(default_factory=dict)
    num_left_out: int = 0


def score_text(
    question_id: str,
    text: str | None,
    golds: Sequence[str],
    *,
    question: str = "",
    answer_in_graph: bool | None = None,
    retrieval: Mapping[str, float] | None = None,
    num_left_out: int = 0,
) -> QuestionRecord:
    """Parses and scores one generated text.

    Args:
        question_id: id of the question, for messages.
        text: the generated text, empty for a failed generation. None skips answer metrics.
        golds: the gold answers.
        question: text of the question. Only the subgraphrag scores read it.
        answer_in_graph: whether some gold answer is an entity of the graph, None if unknown.
        retrieval: retrieval metrics of the question.
        num_left_out: number of facts that were chosen for the prompt and found no room in it.

    Raises:
        ValueError: `golds` is a text instead of a list.
    """
    # The published rog precision counts repeated answers. No other score does.
    predictions = [] if text is None else parse_answers(text, keep_repeats=True)
    return QuestionRecord(
        question_id=question_id,
        scores={} if text is None else score_question(predictions, golds, question=question),
        num_golds=len(golds),
        num_predictions=len(set(predictions)),
        answer_in_graph=answer_in_graph,
        retrieval=dict(retrieval or {}),
        num_left_out=num_left_out,
    )


@dataclass(frozen=True, slots=True)
class Report:
    """Macro means and their denominators.

    Attributes:
        counts: numbers of questions by name: `asked`, `scored` (equal to `asked`), `no_gold` (no
            gold answer), `empty_predictions`, `answerable_in_subgraph` (None if unknown for any),
            `facts_left_out` (chosen for a prompt, without room in it) and `prompts_cut` (prompts
            with such facts).
        means: mean of each metric as a fraction. Empty if no question was asked.
        num_scored: number of questions in each mean. For answer metrics it is `asked`.
    """

    counts: Mapping[str, int | None]
    means: Mapping[str, float]
    num_scored: Mapping[str, int]

    def families(self) -> dict[str, int]:
        """Returns the number of scored questions for each family (`strict`, `rog`, ...)."""
        sizes: dict[str, int] = {}
        for name, num in self.num_scored.items():
            family = name.partition("-")[0]
            sizes[family] = max(num, sizes.get(family, 0))
        return sizes

    def to_dict(self) -> dict[str, object]:
        """Returns the report as plain values, with the versions of schema and metrics."""
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
        """Returns an aligned table: means in percent (`facts-*` as numbers), then the counts."""
        rows = [("metric", "percent", "scored")]
        for name, mean in self.means.items():
            # Means of counts are not fractions.
            shown = f"{mean:.2f}" if name.startswith("facts-") else f"{100 * mean:.2f}"
            rows.append((name, shown, str(self.num_scored[name])))
        counts = [(n, "unknown" if c is None else str(c), "") for n, c in self.counts.items()]
        first, second, third = (max(map(len, cells)) for cells in zip(*rows, *counts, strict=True))
        lines = [f"{a:<{first}}  {b:>{second}}  {c:>{third}}".rstrip() for a, b, c in rows]
        lines += ["", *(f"{a:<{first}}  {b:>{second}}" for a, b, _ in counts)]
        return "\n".join(lines) + "\n"


def aggregate(records: Iterable[QuestionRecord]) -> Report:
    """Averages over the questions of a split. No question is left out of an answer metric.

    Args:
        records: one for each question asked, including failed and unanswerable ones.

    Raises:
        ValueError: questions differ in their answer metrics, a metric is given as both an answer
            and a retrieval metric, or a value is not finite.
    """
    rows = list(records)
    values: dict[str, list[float]] = {name: [] for name in (rows[0].scores if rows else ())}
    answer_names = set(values)
    for row in rows:
        if set(row.scores) != answer_names:
            different = ", ".join(sorted(set(row.scores) ^ answer_names))
            raise ValueError(
                f"question {row.question_id!r}: every question needs the same answer metrics, "
                f"but these differ from the first question: {different}"
            )
        if both := answer_names & set(row.retrieval):
            raise ValueError(
                f"question {row.question_id!r}: {sorted(both)} are answer and retrieval metrics"
            )
        for name, value in (*row.scores.items(), *row.retrieval.items()):
            if not math.isfinite(value):
                raise ValueError(f"question {row.question_id!r}: {name} is {value}, not finite")
            values.setdefault(name, []).append(float(value))
    in_graph = [row.answer_in_graph for row in rows]
    counts = {
        "asked": len(rows),
        "answerable_in_subgraph": None if None in in_graph else sum(map(bool, in_graph)),
        "no_gold": sum(row.num_golds == 0 for row in rows),
        "scored": len(rows),
        # A run of phase 1 generates nothing, so it has no scores and no empty predictions.
        "empty_predictions": sum(bool(row.scores) and row.num_predictions == 0 for row in rows),
        "facts_left_out": sum(row.num_left_out for row in rows),
        "prompts_cut": sum(row.num_left_out > 0 for row in rows),
    }
    # fsum makes the mean independent of the order of the questions.
    means = {name: math.fsum(column) / len(column) for name, column in values.items()}
    num_scored = {name: len(column) for name, column in values.items()}
    return Report(counts=counts, means=means, num_scored=num_scored)
