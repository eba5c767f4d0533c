"""The protocol between training loop and phase, and the code that both phases share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dragkit.checkpoint.checkpoint import LoadedCheckpoint, load_tensors_into
from dragkit.config import TrainConfig
from dragkit.data.packed import PackedGraph, QuestionBatch
from dragkit.eval.types import Prediction
from dragkit.retriever.fact_sampler import FactSelection
from dragkit.retriever.losses import retrieval_loss
from dragkit.retriever.retriever import RetrieverOutput
from dragkit.retriever.text_encoder import RelationStates
from dragkit.trainer.compile import autocast

# File stem of the trained tensors in a checkpoint. Earlier versions wrote heads.safetensors.
STATE_FILE = "retriever_projector"
_EARLIER_STATE_FILE = "heads"
# Count of `Phase.counts` that a part is a mean over.
_COUNT_OF = {"retrieval": "questions", "generator": "tokens", "token_accuracy": "tokens"}


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Results of one micro-batch.

    Attributes:
        loss: float32 [] detached. The losses of an optimizer step's micro-batches add up.
        parts: detached scalars for the log.
        num_questions, num_facts, num_tokens: host counts. Tokens are prompt tokens of phase 2.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    num_questions: int
    num_facts: int
    num_tokens: int


class Phase(ABC):
    """The part of training that differs between the phases. `Trainer` runs it.

    Attributes:
        validation_limit: number of validation questions. None takes all.
        validates_answers: whether validation generates answers.
        takes_host_batches: whether `training_step` copies its batch to the device itself.
    """

    name: str
    model: nn.Module
    forward: Callable[..., RetrieverOutput]
    validation_limit: int | None = None
    validates_answers = False
    takes_host_batches = False

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def retrieval_loss(self, logits: Tensor, graph: PackedGraph) -> Tensor:
        """The retrieval loss, float32 [], summed over the labelled questions of a graph."""
        loss = self.config.loss
        return retrieval_loss(logits, graph.label, graph.fact_ptr, rho=loss.rho, margin=loss.margin)

    def retrieve(
        self, batch: QuestionBatch, relations: RelationStates, *, cache: bool = True
    ) -> RetrieverOutput:
        """Runs the retriever in the run's precision. For `cache` see `autocast`."""
        with autocast(self.config.run.precision, relations.states.device, cache=cache):
            return self.forward(batch, relations)

    @abstractmethod
    def parameter_groups(self) -> list[dict]:
        """Optimizer groups by role, each with `name`, `params`, `lr` and `weight_decay`."""

    @abstractmethod
    def counts(self, batches: Sequence[QuestionBatch]) -> dict[str, int]:
        """Host counts over this rank's micro-batches of one optimizer step.

        Summed over ranks and clamped to at least 1, they are the denominators of the losses.
        """

    @abstractmethod
    def training_step(
        self, batch: QuestionBatch, relations: RelationStates, counts: dict[str, float], step: int
    ) -> StepOutput:
        """Runs forward and backward of one micro-batch and accumulates its gradients.

        Args:
            batch: questions, on the model's device or in host memory.
            relations: token states of the data set's relations, on the model's device.
            counts: denominators of the losses, see `counts`.
            step: index of the optimizer step.
        """

    @abstractmethod
    def idle_step(self, device: torch.device) -> StepOutput:
        """Takes the place of `training_step` on a rank without questions in this micro-batch."""

    @abstractmethod
    def check_gradients(self, counts: Mapping[str, int]) -> None:
        """Checks the clipped gradients of an optimizer step and raises where one is missing."""

    @abstractmethod
    def predict(
        self, batch: QuestionBatch, relations: RelationStates, *, generate: bool = True
    ) -> list[Prediction]:
        """Ranked facts of every question and, with `generate` in phase 2, a greedy answer."""

    @abstractmethod
    def run_dummy_passes(self) -> None:
        """Takes part in the passes of other ranks until all have finished predicting."""

    @abstractmethod
    def trainable_state(self) -> dict[str, Tensor]:
        """Tensors of `retriever_projector.safetensors`, sharing memory with the model."""

    def adapter_writer(self) -> Callable[[Path], None] | None:
        """A function that writes the adapters into a folder, in PEFT's layout, or None."""
        return None

    def load(self, loaded: LoadedCheckpoint) -> None:
        """Copies all weights of a checkpoint of this phase into the model."""
        load_state(self.trainable_state(), loaded)

    @abstractmethod
    def score(self, metrics: Mapping[str, float]) -> float | None:
        """The validation metric that picks the best checkpoint (higher is better), if any."""


def with_counted_parts(output: StepOutput, counts: Mapping[str, int]) -> StepOutput:
    """Drops the parts of a step in which nothing was counted for them.

    The mean loss over no token is undefined. A 0 in the log would look like a perfect answer.
    """
    parts = {k: v for k, v in output.parts.items() if counts.get(_COUNT_OF.get(k, ""), 1)}
    return replace(output, parts=parts)


def module_tensors(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The module's state dict with `prefix.` before every name, sharing memory."""
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def load_state(state: dict[str, Tensor], loaded: LoadedCheckpoint, prefix: str = "") -> None:
    """Copies the checkpoint's tensors whose names start with `prefix` into `state`.

    Raises:
        CheckpointError: the names or shapes differ.
    """
    stem = STATE_FILE if STATE_FILE in loaded.tensors else _EARLIER_STATE_FILE
    saved = {k: v for k, v in loaded.tensors[stem].items() if k.startswith(prefix)}
    load_tensors_into(state, saved, what=str(loaded.folder))


def rank_facts(
    batch: QuestionBatch,
    logits: Tensor,
    selection: FactSelection,
    texts: Sequence[str] | None = None,
    left_out: Tensor | None = None,
) -> list[Prediction]:
    """Sorts the facts of each question on the host.

    Args:
        batch: the questions.
        logits: float [E]. The highest comes first.
        selection: int32 [B, K] facts chosen for the prompts.
        texts: the answer to each question.
        left_out: bool [B, K] chosen facts without room in their prompt. None is no fact.
    """
    probability = torch.sigmoid(logits.float()).cpu()
    host_logits, ptr = logits.cpu(), batch.graph.fact_ptr.tolist()
    index, num_left_out = selection.index, [0] * len(batch.rows)
    if left_out is not None:
        index, num_left_out = index.masked_fill(left_out, -1), left_out.sum(1).tolist()
    selected = index.tolist()
    predictions = []
    for i, row in enumerate(batch.rows):
        start, end = ptr[i], ptr[i + 1]
        # A stable sort keeps ties in the order of the file, so predictions are reproducible.
        order = torch.argsort(host_logits[start:end], descending=True, stable=True)
        predictions.append(
            Prediction(
                row=row,
                ranked=tuple(order.tolist()),
                selected=tuple(fact - start for fact in selected[i] if fact >= 0),
                probability=tuple(probability[start:end][order].tolist()),
                text=None if texts is None else texts[i],
                num_left_out=num_left_out[i],
            )
        )
    return predictions
