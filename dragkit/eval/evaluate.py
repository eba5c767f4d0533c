"""Runs a phase over a split and scores every question of it; none is left out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from dragkit.eval.metrics import answer_hit_at_k, answer_recall_at_k, retrieval_prf
from dragkit.eval.report import QuestionRecord, Report, aggregate, score_text
from dragkit.eval.types import Prediction, Predictor, Source

if TYPE_CHECKING:
    from dragkit.data.store import StoredQuestion
    from dragkit.distributed.ranks import Ranks

RECALL_AT = (5, 10, 20, 50, 100)


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Scores of a split and the predictions they were computed from."""

    report: Report
    predictions: list[dict[str, object]]

    def summary_line(self) -> str:
        """The main numbers in one line."""
        means = self.report.means
        names = (
            "strict-hits@1",
            "strict-f1",
            "retrieval-f1",
            "retrieval-recall",
            "answer-recall@10",
        )
        found = [f"{name} {100 * means[name]:.1f}" for name in names if name in means]
        return ", ".join(found) + f" ({self.report.counts['asked']} questions)"

    def sample_lines(self, count: int) -> list[str]:
        """The first answers beside their golds, for the log."""
        return [
            f"  {p['question']} -> {p['text'] or '(nothing)'} [{' | '.join(p['answers'][:4])}]"
            for p in self.predictions[:count]
            if p["text"] is not None
        ]


def _retrieval_scores(question: StoredQuestion, prediction: Prediction) -> dict[str, float]:
    """Retrieval metrics; those without meaning for a question are left out of its record."""
    scores: dict[str, float] = {}
    positive = [i for i, label in enumerate(question.labels) if label > 0.5]
    if positive:
        precision, recall, f1 = retrieval_prf(prediction.selected, positive)
        scores |= {
            "retrieval-precision": precision,
            "retrieval-recall": recall,
            "retrieval-f1": f1,
        }
    if question.answers:
        ends = [(question.triples[i][0], question.triples[i][2]) for i in prediction.ranked]
        for k in RECALL_AT:
            scores[f"answer-recall@{k}"] = answer_recall_at_k(ends, question.answers, k)
        scores["answer-hit@10"] = answer_hit_at_k(ends, question.answers, 10)
    scores["facts-selected"] = float(len(prediction.selected))
    return scores


def _record(question: StoredQuestion, prediction: Prediction) -> QuestionRecord:
    entities = {name for head, _, tail in question.triples for name in (head, tail)}
    in_graph = any(answer in entities for answer in question.answers)
    retrieval = _retrieval_scores(question, prediction)
    if prediction.text is None:
        return QuestionRecord(
            question_id=question.id,
            scores={},
            num_golds=len(question.answers),
            num_predictions=0,
            answer_in_graph=in_graph,
            retrieval=retrieval,
        )
    return score_text(
        question.id,
        prediction.text,
        question.answers,
        question=question.text,
        answer_in_graph=in_graph,
        retrieval=retrieval,
    )


_Scored = tuple[QuestionRecord, dict[str, object]]


def _scored(question: StoredQuestion, prediction: Prediction) -> _Scored:
    selected = set(prediction.selected)
    facts = [
        {"triple": list(question.triples[i]), "p": round(p, 6)}
        for i, p in zip(prediction.ranked, prediction.probability, strict=True)
        if i in selected
    ]
    shown = {
        "id": question.id,
        "question": question.text,
        "answers": list(question.answers),
        "text": prediction.text,
        "facts": facts,
    }
    return _record(question, prediction), shown


def _of_all_ranks(own: list[list[_Scored]], ranks: Ranks, batches: int) -> list[list[_Scored]]:
    """The scores of all batches, of which each rank has every `ranks.world_size`-th."""
    everyone = ranks.all_gather_object(
        [[(asdict(r), shown) for r, shown in batch] for batch in own]
    )  # type: ignore[misc]
    return [
        [
            (QuestionRecord(**record), shown)
            for record, shown in everyone[i % ranks.world_size][i // ranks.world_size]  # type: ignore[index, call-overload]
        ]
        for i in range(batches)
    ]


@torch.no_grad()
def evaluate(
    phase: Predictor,
    source: Source,
    device: torch.device,
    *,
    limit: int | None = None,
    generate: bool = True,
    ranks: Ranks | None = None,
) -> EvaluationResult:
    """Scores a phase's model on a split, in file order.

    Args:
        phase: of training, with its model; source: the split.
        device: of the model.
        limit: number of questions to evaluate, from the first; None takes all.
        generate: False leaves answers out and scores retrieval alone.
        ranks: deal the batches out to these. Each batch is as with one rank, so the scores are
            too, and every rank gets all of them.

    Returns:
        Macro means with their denominators, and every prediction.
    """
    was_training = phase.model.training
    phase.model.eval()
    relations = source.relations.to(device)  # type: ignore[attr-defined]
    batches = source.batch_sampler.in_file_order(limit)  # type: ignore[attr-defined]
    alone = ranks is None or ranks.is_single
    own = batches if alone else batches[ranks.rank :: ranks.world_size]
    scored = [
        [
            _scored(source.store.question(p.row), p)
            for p in phase.predict(batch.to(device), relations, generate=generate)
        ]
        for batch in source.load(own, device)
    ]
    phase.run_dummy_passes()
    if not alone:
        scored = _of_all_ranks(scored, ranks, len(batches))
    phase.model.train(was_training)
    rows = [row for batch in scored for row in batch]
    return EvaluationResult(aggregate(r for r, _ in rows), [shown for _, shown in rows])
