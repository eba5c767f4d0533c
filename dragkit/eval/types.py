"""Protocols of an evaluation: a data set in batches, and a phase that predicts answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from dragkit.data.batching import FactBudgetBatchSampler
from dragkit.data.packed import QuestionBatch, RelationStates
from dragkit.data.store import PackedStore


@dataclass(frozen=True, slots=True)
class Prediction:
    """Prediction for one question.

    Attributes:
        row: the question's row in its store.
        ranked: facts by falling probability, as indices within the question.
        selected: the facts in the prompt.
        probability: probability of each ranked fact.
        text: the generated answer, None without a generator.
        num_left_out: number of facts that were chosen for the prompt and found no room in it.
    """

    row: int
    ranked: tuple[int, ...]
    selected: tuple[int, ...]
    probability: tuple[float, ...]
    text: str | None
    num_left_out: int = 0


class Dataset(Protocol):
    """Questions of a split in batches."""

    store: PackedStore
    relations: RelationStates
    batch_sampler: FactBudgetBatchSampler

    def load(
        self, batches: Sequence[Sequence[int]], device: torch.device
    ) -> Iterator[QuestionBatch]:
        """Yields collated batches on `device` or in host memory."""
        ...


class Predictor(Protocol):
    """A model that ranks facts and answers questions. Both training phases implement it."""

    model: nn.Module

    def predict(
        self, batch: QuestionBatch, relations: RelationStates, *, generate: bool = True
    ) -> list[Prediction]:
        """Returns one prediction per question. It is deterministic.

        Without `generate`, or in a phase without a generator, `text` is None.
        """
        ...

    def run_dummy_passes(self) -> None:
        """Runs passes without questions until all ranks have called it after their last `predict`.

        A rank needs the weight shards of all others for as long as it generates.
        """
        ...
