"""Evaluation: metrics of answers and of retrieved facts, and the report over a split."""

from dragkit.eval.metrics import (
    METRIC_VERSION,
    answer_recall_at_k,
    average_precision,
    parse_answers,
    retrieval_prf,
    score_question,
    strict_key,
    strict_scores,
)
from dragkit.eval.published_metrics import rearev_scores, rog_scores, subgraphrag_scores
from dragkit.eval.report import QuestionRecord, Report, aggregate, score_text

__all__ = [
    "METRIC_VERSION",
    "QuestionRecord",
    "Report",
    "aggregate",
    "answer_recall_at_k",
    "average_precision",
    "parse_answers",
    "rearev_scores",
    "retrieval_prf",
    "rog_scores",
    "score_question",
    "score_text",
    "strict_key",
    "strict_scores",
    "subgraphrag_scores",
]
