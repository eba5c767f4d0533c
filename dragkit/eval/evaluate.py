"""Evaluates a phase on a split. Every question is scored."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from dragkit.data.store import StoredQuestion
from dragkit.distributed.ranks import Ranks
from dragkit.eval.metrics import (
    answer_recall_at_k,
    average_precision,
    parse_answers,
    retrieval_prf,
)
from dragkit.eval.report import QuestionRecord, Report, aggregate, score_text
from dragkit.eval.types import Dataset, Prediction, Predictor

logger = logging.getLogger(__name__)

RECALL_AT = (5, 10, 20, 50, 100)
_SUMMARY_METRICS = (
    "strict-hits@1",
    "strict-f1",
    "retrieval-f1",
    "retrieval-recall",
    "answer-recall@10",
)


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Scores of a split, and the predictions with their scores as plain values for a JSON file."""

    report: Report
    predictions: list[dict[str, object]]

    def summary_line(self) -> str:
        """Returns the main metrics in percent and the number of questions, in one line."""
        means = self.report.means
        metrics = [f"{name} {100 * means[name]:.1f}" for name in _SUMMARY_METRICS if name in means]
        return ", ".join(metrics) + f" ({self.report.counts['asked']} questions)"

    def sample_lines(self, count: int) -> list[str]:
        """Returns up to `count` generated answers with their gold answers, a line each."""
        lines = [
            f"{p['question']} -> {p['text'] or '(nothing)'} [{' | '.join(p['answers'][:4])}]"
            for p in self.predictions[:count]
            if p["text"] is not None
        ]
        # A text of the data may have several lines.
        return [f"  {' '.join(line.split())}" for line in lines]


def _retrieval_scores(question: StoredQuestion, prediction: Prediction) -> dict[str, float]:
    """Returns the retrieval metrics that are defined for a question."""
    scores: dict[str, float] = {}
    ranking = prediction.ranked, prediction.probability
    positive = [i for i, label in enumerate(question.labels) if label > 0.5]
    if positive:
        precision, recall, f1 = retrieval_prf(prediction.selected, positive)
        scores |= {
            "retrieval-precision": precision,
            "retrieval-recall": recall,
            "retrieval-f1": f1,
            "retrieval-average-precision": average_precision(*ranking, positive),
        }
    for name, relevant in (
        ("evidence", question.evidence),
        ("relation-path", question.relation_path_facts),
    ):
        # Precision needs a chosen fact. Recall and average precision need a relevant one.
        if relevant is None or not prediction.selected:
            continue
        precision, recall, _ = retrieval_prf(prediction.selected, relevant)
        scores[f"{name}-precision"] = precision
        if relevant:
            scores[f"{name}-recall"] = recall
            scores[f"{name}-average-precision"] = average_precision(*ranking, relevant)
    if question.answers:
        ends = [(question.triples[i][0], question.triples[i][2]) for i in prediction.ranked]
        for k in RECALL_AT:
            scores[f"answer-recall@{k}"] = answer_recall_at_k(ends, question.answers, k)
        scores["answer-hit@10"] = float(scores["answer-recall@10"] > 0)
    scores["facts-selected"] = float(len(prediction.selected))
    return scores


def _score(question: StoredQuestion, prediction: Prediction) -> QuestionRecord:
    entities = {name for head, _, tail in question.triples for name in (head, tail)}
    return score_text(
        question.id,
        prediction.text,
        question.answers,
        question=question.text,
        answer_in_graph=any(answer in entities for answer in question.answers),
        retrieval=_retrieval_scores(question, prediction),
        num_left_out=prediction.num_left_out,
    )


def _to_json(question: StoredQuestion, prediction: Prediction) -> dict[str, object]:
    selected = set(prediction.selected)
    facts = [
        {"triple": list(question.triples[i]), "p": round(p, 6)}
        for i, p in zip(prediction.ranked, prediction.probability, strict=True)
        if i in selected
    ]
    return {
        "id": question.id,
        "question": question.text,
        "answers": list(question.answers),
        "text": prediction.text,
        "parsed": None if prediction.text is None else parse_answers(prediction.text),
        "facts": facts,
        "facts_left_out": prediction.num_left_out,
    }


def _scored(
    question: StoredQuestion, prediction: Prediction
) -> tuple[QuestionRecord, dict[str, object]]:
    record = _score(question, prediction)
    scores = {**record.scores, **record.retrieval}
    return record, {**_to_json(question, prediction), "scores": scores}


@torch.no_grad()
def evaluate(
    phase: Predictor,
    dataset: Dataset,
    device: torch.device,
    *,
    limit: int | None = None,
    generate: bool = True,
    ranks: Ranks | None = None,
) -> EvaluationResult:
    """Scores a phase's model on a split, in file order.

    Args:
        phase: a phase with its model.
        dataset: the split.
        device: device of the model.
        limit: number of questions to evaluate, from the first. None takes all.
        generate: False skips answers and scores retrieval only.
        ranks: processes that share the batches. A batch does not depend on their number, so
            neither do the scores. Every rank returns all of them.

    Returns:
        Macro means with their denominators, and every prediction.
    """
    ranks = Ranks() if ranks is None else ranks
    was_training = phase.model.training
    phase.model.eval()
    relations = dataset.relations.to(device)
    batches = dataset.batch_sampler.in_file_order(limit)
    scored = []
    for batch in dataset.load(batches[ranks.rank :: ranks.world_size], device):
        predictions = phase.predict(batch.to(device), relations, generate=generate)
        questions = [dataset.store.question(prediction.row) for prediction in predictions]
        pairs = list(zip(questions, predictions, strict=True))
        scored.append([_scored(*pair) for pair in pairs])
    phase.run_dummy_passes()
    gathered = ranks.all_gather_object(scored)
    phase.model.train(was_training)
    # Batch i was scored by rank i % world_size.
    rows = [
        row
        for i in range(len(batches))
        for row in gathered[i % ranks.world_size][i // ranks.world_size]
    ]
    report = aggregate(record for record, _ in rows)
    if report.counts["facts_left_out"]:
        logger.warning(
            "%s: %d facts found no room in the prompts of %d of %d questions and were left out. "
            "Raise generator.max_prompt_tokens, or choose fewer facts with sampler.k_facts",
            dataset.store.path,
            report.counts["facts_left_out"],
            report.counts["prompts_cut"],
            report.counts["asked"],
        )
    return EvaluationResult(report, [json for _, json in rows])
