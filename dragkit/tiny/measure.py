"""How often the whole answer is right on unseen names, by kind of question and slots."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dragkit.generator.nemotron_h.backends import MambaOps
from dragkit.generator.nemotron_h.decoder import hidden_at_rows
from dragkit.tiny.batches import IGNORED, Batch, PromptWriter, Slots, collate
from dragkit.tiny.names import NameSource
from dragkit.tiny.tasks import KINDS, draw_sample, noisy_markers, without_clue
from dragkit_kernels import causal_conv, ssd_scan

_OPS = MambaOps(causal_conv, ssd_scan)
FULL_COUNT = 10
ROWS_PER_PASS = 64


def answer_logits(model: nn.Module, batch: Batch, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Logits at the tokens before the supervised ones, and those supervised tokens.

    Args:
        model: the causal LM.
        batch: B rows.
        noise: largest size of the Gaussian noise added to the slots, as a share of the embeddings'
            root mean square; each row draws its own size. Projected vectors are not exact markers.

    Returns:
        float32 [A, V] and int64 [A], rows in order.
    """
    table = model.get_input_embeddings()
    embeds = table(batch.input_ids) * batch.scale[:, None]
    if noise > 0:
        rms = table.weight.detach().square().mean().sqrt()
        level = torch.rand(len(batch.pack.ptr) - 1, 1)[batch.pack.sequence] * (noise * rms)
        embeds = embeds + torch.randn_like(embeds) * level * batch.is_slot[:, None]
    rows = _rows_before_answers(batch)
    hidden = hidden_at_rows(model.model, embeds, batch.pack, rows, _OPS)
    return model.lm_head(hidden), batch.labels[rows + 1]


def _rows_before_answers(batch: Batch) -> Tensor:
    """int64 [A] tokens whose successor is supervised."""
    return (batch.labels[1:] != IGNORED).nonzero().squeeze(1)


def exact_rows(logits: Tensor, target: Tensor, batch: Batch) -> Tensor:
    """bool [B]: rows whose supervised tokens are all the most likely: greedy decoding."""
    right = torch.ones(len(batch.pack.ptr) - 1, dtype=torch.bool)
    wrong = logits.argmax(-1) != target
    right[batch.pack.sequence[_rows_before_answers(batch)[wrong]]] = False
    return right


@torch.no_grad()
def exact_match(
    model: nn.Module,
    writer: PromptWriter,
    kind: str,
    num_facts: int,
    slots: Slots,
    *,
    num_questions: int = 128,
    seed: int = 991,
    right: float = 1.0,
    clue: bool = True,
    names: Mapping[str, tuple[str, ...]] | None = None,
) -> float:
    """Share of fresh questions whose whole answer, end token included, is right.

    Args:
        model: the causal LM, left in evaluation mode.
        writer: its prompts.
        kind: kind of question.
        num_facts: facts per question.
        slots: what stands before each fact.
        num_questions: how many to ask.
        seed: of the questions; a seed's names are its own.
        right: probability that a marker is right.
        clue: False takes a question whose text says nothing.
        names: further arguments of `NameSource`; none gives invented words only.
    """
    rng = random.Random(f"{seed} {kind} {num_facts}")
    source = NameSource(rng, words_only=names is None, **(names or {}))
    rows = []
    for _ in range(num_questions):
        sample = draw_sample(kind, source, rng, num_facts)
        sample = sample if clue else without_clue(sample, source, rng)
        rows.append(writer.prompt(sample, slots, noisy_markers(sample, rng, right)))
    model.eval()
    exact = 0
    for start in range(0, num_questions, ROWS_PER_PASS):
        batch = collate(rows[start : start + ROWS_PER_PASS])
        exact += int(exact_rows(*answer_logits(model, batch), batch).sum())
    return exact / num_questions


def exact_match_table(
    model: nn.Module,
    writer: PromptWriter,
    names: Mapping[str, tuple[str, ...]],
    *,
    num_questions: int = 128,
    fact_counts: tuple[int, ...] = (2, 5, 10, 15),
) -> dict[str, dict[str, float]]:
    """Exact match of every kind and number of facts, in the columns of the provenance record."""
    columns: dict[str, dict] = {"plain": {"slots": "none"}, "marked": {"slots": "marked"}}
    # Only at FULL_COUNT facts.
    extra: dict[str, dict] = {
        "neutral": {"slots": "neutral"},
        "noisy": {"slots": "marked", "right": 0.93},
        "no_clue": {"slots": "marked", "clue": False},
        "any_name": {"slots": "marked", "names": names},
    }

    def cell(kind: str, count: int, settings: dict) -> float:
        return round(
            exact_match(model, writer, kind, count, num_questions=num_questions, **settings), 3
        )

    return {
        f"{kind}@{count}": {
            column: cell(kind, count, settings)
            for column, settings in (columns | (extra if count == FULL_COUNT else {})).items()
        }
        for kind in KINDS
        for count in fact_counts
    }
