"""Exact match of whole answers about unseen names, by question type and slot content."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dragkit.generator.nemotron_h.backends import MambaOps
from dragkit.generator.nemotron_h.decoder import hidden_at_rows
from dragkit.tiny.batches import IGNORE_INDEX, Batch, PromptWriter, Slots, collate
from dragkit.tiny.names import NameSource
from dragkit.tiny.tasks import QUESTION_TYPES, draw_sample, noisy_markers, without_clue
from dragkit_kernels import causal_conv, ssd_scan

_OPS = MambaOps(causal_conv, ssd_scan)
EXTRA_COLUMNS_AT = 10
ROWS_PER_BATCH = 64


def answer_logits(model: nn.Module, batch: Batch, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Logits that predict the supervised tokens, and these tokens.

    Args:
        model: the causal LM.
        batch: B rows.
        noise: upper bound of the standard deviation of the Gaussian noise on slot embeddings, in
            units of the embedding table's root mean square. Each row draws its own deviation.

    Returns:
        Logits float32 [A, V] and tokens int64 [A], rows in order.
    """
    table = model.get_input_embeddings()
    embeds = table(batch.input_ids) * batch.scale[:, None]
    if noise > 0:
        # A projected vector of phase 2 is close to a marker, but never equal.
        rms = table.weight.detach().square().mean().sqrt()
        level = torch.rand(len(batch.pack.ptr) - 1, 1)[batch.pack.sequence] * (noise * rms)
        embeds = embeds + torch.randn_like(embeds) * level * batch.is_slot[:, None]
    rows = _positions_before_answers(batch)
    hidden = hidden_at_rows(model.model, embeds, batch.pack, rows, _OPS)
    return model.lm_head(hidden), batch.labels[rows + 1]


def _positions_before_answers(batch: Batch) -> Tensor:
    """Positions int64 [A] whose next token is supervised."""
    return (batch.labels[1:] != IGNORE_INDEX).nonzero().squeeze(1)


def rows_all_correct(logits: Tensor, target: Tensor, batch: Batch) -> Tensor:
    """Rows bool [B] in which every supervised token is the most likely one, as greedy decoding."""
    correct = torch.ones(len(batch.pack.ptr) - 1, dtype=torch.bool)
    wrong = logits.argmax(-1) != target
    correct[batch.pack.sequence[_positions_before_answers(batch)[wrong]]] = False
    return correct


@torch.no_grad()
def exact_match(
    model: nn.Module,
    writer: PromptWriter,
    question_type: str,
    num_facts: int,
    slots: Slots,
    *,
    num_questions: int = 128,
    seed: int = 991,
    marker_accuracy: float = 1.0,
    with_clue: bool = True,
    names: Mapping[str, tuple[str, ...]] | None = None,
) -> float:
    """Fraction of new questions whose whole answer, end token included, is right.

    Args:
        model: the causal LM. It stays in evaluation mode.
        writer: writes the prompts.
        question_type: one of `QUESTION_TYPES`.
        num_facts: facts per question.
        slots: content of the slot before each fact, see `PromptWriter.prompt`.
        num_questions: number of questions.
        seed: seed of the questions and of their names.
        marker_accuracy: probability that a marker is right.
        with_clue: False asks questions whose text says nothing about the facts.
        names: `pieces` and `listed` of `NameSource`. None draws invented words only.
    """
    rng = random.Random(f"{seed} {question_type} {num_facts}")
    source = NameSource(rng, words_only=names is None, **(names or {}))
    rows = []
    for _ in range(num_questions):
        sample = draw_sample(question_type, source, rng, num_facts)
        sample = sample if with_clue else without_clue(sample, source, rng)
        rows.append(writer.prompt(sample, slots, noisy_markers(sample, rng, marker_accuracy)))
    model.eval()
    exact = 0
    for start in range(0, num_questions, ROWS_PER_BATCH):
        batch = collate(rows[start : start + ROWS_PER_BATCH])
        exact += int(rows_all_correct(*answer_logits(model, batch), batch).sum())
    return exact / num_questions


def exact_match_table(
    model: nn.Module,
    writer: PromptWriter,
    names: Mapping[str, tuple[str, ...]],
    *,
    num_questions: int = 128,
    fact_counts: tuple[int, ...] = (2, 5, 10, 15),
) -> dict[str, dict[str, float]]:
    """Exact match by question type and number of facts, as the provenance record shows it."""
    columns: dict[str, dict] = {"plain": {"slots": "none"}, "marked": {"slots": "marked"}}
    # These columns are measured at EXTRA_COLUMNS_AT facts only.
    extra: dict[str, dict] = {
        "neutral": {"slots": "neutral"},
        "noisy": {"slots": "marked", "marker_accuracy": 0.93},
        "no_clue": {"slots": "marked", "with_clue": False},
        "any_name": {"slots": "marked", "names": names},
    }

    def cell(question_type: str, count: int, settings: dict) -> float:
        return round(
            exact_match(
                model, writer, question_type, count, num_questions=num_questions, **settings
            ),
            3,
        )

    return {
        f"{question_type}@{count}": {
            column: cell(question_type, count, settings)
            for column, settings in (columns | (extra if count == EXTRA_COLUMNS_AT else {})).items()
        }
        for question_type in QUESTION_TYPES
        for count in fact_counts
    }
