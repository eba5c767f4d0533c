"""What an evaluation takes: questions in batches, and a model that predicts their answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from dragkit.data.packed import QuestionBatch

if TYPE_CHECKING:
    from dragkit.data.store import PackedStore


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says about one question.

    Attributes:
        row: the question in its store.
        ranked: its facts by falling probability, indices within the question.
        selected: those that enter the prompt.
        probability: of the ranked facts.
        text: the generated answer; None without a generator.
    """

    row: int
    ranked: tuple[int, ...]
    selected: tuple[int, ...]
    probability: tuple[float, ...]
    text: str | None


class Source(Protocol):
    """Questions in batches, and their records."""

    store: PackedStore
    relations: object
    batch_sampler: object

    def load(
        self, batches: Sequence[Sequence[int]], device: torch.device
    ) -> Iterator[QuestionBatch]:
        """Collated batches for a device, there or in host memory."""
        ...


class Predictor(Protocol):
    """A model that ranks facts and answers questions; both training phases are one."""

    model: nn.Module

    def predict(
        self, batch: QuestionBatch, relations: object, *, generate: bool = True
    ) -> list[Prediction]:
        """Deterministic predictions, one per question of the batch.

        Without `generate` they hold ranked facts alone, as in a phase that has no generator.
        """
        ...

    def run_dummy_passes(self) -> None:
        """Returns when other ranks need nothing more from this one; follows the last `predict`."""
        ...
