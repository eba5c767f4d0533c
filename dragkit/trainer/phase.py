"""What a training phase is to the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dragkit.checkpoint.checkpoint import LoadedCheckpoint
from dragkit.data.packed import QuestionBatch
from dragkit.eval.types import Predictor
from dragkit.retriever.text_encoder import RelationStates


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one micro-batch did; tensors are detached, counts are host integers.

    Attributes:
        loss: float32 [] its share of the optimizer step's loss.
        parts: named scalars for the log, each also a share of the step.
        num_questions, num_facts, num_tokens: the work done (tokens are real, unpadded ones).
    """

    loss: Tensor
    parts: dict[str, Tensor]
    num_questions: int
    num_facts: int
    num_tokens: int


class Phase(Predictor, Protocol):
    """What differs between the phases; `Trainer` is what does not."""

    name: str
    validation_limit: int | None
    validates_answers: bool

    def parameter_groups(self) -> list[dict]:
        """Trained parameters by role: `name`, `params`, `lr` and `weight_decay` of each group."""
        ...

    def counts(self, batches: Sequence[QuestionBatch]) -> dict[str, int]:
        """Host counts over the micro-batches of one optimizer step.

        Added up over all ranks, and at least 1, they are what the step's sums are divided by.
        """
        ...

    def training_step(
        self, batch: QuestionBatch, relations: RelationStates, counts: dict[str, float], step: int
    ) -> StepOutput:
        """Forward and backward of one micro-batch; gradients add up until the optimizer steps.

        The batch is where the model is or in host memory, the relations are where the model is.
        """
        ...

    def idle_step(self, device: torch.device) -> StepOutput:
        """What a rank does while others have all questions of a micro-batch."""
        ...

    def check_gradients(self, counts: Mapping[str, int]) -> None:
        """Looks at the clipped gradients of an optimizer step; raises where one is missing."""
        ...

    def trainable_state(self) -> dict[str, Tensor]:
        """Trained tensors that go into `trainable_state.safetensors`."""
        ...

    def adapter_writer(self) -> Callable[[Path], None] | None:
        """What writes the generator's adapters into a folder, in PEFT's layout; None without."""
        ...

    def load(self, loaded: LoadedCheckpoint) -> None:
        """Takes all weights of a checkpoint of this phase; every key must fit."""
        ...

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """The one number by which a checkpoint is the best, higher is better; None without one."""
        ...
