"""Phase 1: the retriever alone learns which facts lie on shortest paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dragkit.checkpoint.checkpoint import LoadedCheckpoint, load_tensors_into
from dragkit.config import TrainConfig
from dragkit.data.packed import QuestionBatch
from dragkit.eval.types import Prediction
from dragkit.observe.profiling import nvtx_range
from dragkit.retriever.fact_sampler import FactSampler, FactSelection
from dragkit.retriever.losses import retrieval_loss
from dragkit.retriever.retriever import Retriever, RetrieverOutput
from dragkit.retriever.text_encoder import RelationStates
from dragkit.trainer.compile import autocast
from dragkit.trainer.phase import StepOutput
from dragkit.trainer.replay import StepReplay


def module_tensors(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The module's state, sharing memory, under `prefix.`."""
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def rank_facts(
    batch: QuestionBatch, logits: Tensor, selection: FactSelection, texts: Sequence[str] | None
) -> list[Prediction]:
    """Host-side predictions: every question's facts by falling probability."""
    probability = torch.sigmoid(logits.float()).cpu()
    host, ptr = logits.cpu(), batch.graph.fact_ptr.tolist()
    chosen = selection.index.tolist()
    predictions = []
    for place, row in enumerate(batch.rows):
        start, end = ptr[place], ptr[place + 1]
        order = torch.argsort(host[start:end], descending=True, stable=True)
        predictions.append(
            Prediction(
                row=row,
                ranked=tuple(order.tolist()),
                selected=tuple(i - start for i in chosen[place] if i >= 0),
                probability=tuple(probability[start:end][order].tolist()),
                text=None if texts is None else texts[place],
            )
        )
    return predictions


class RetrieverPhase:
    """Trains `Retriever` by BCE and ranking on the fact labels.

    Args:
        config: the whole configuration; retriever: the model.

    Attributes:
        forward: what is called in the model's place, such as its compiled form.
        replay: runs the training step as recorded work; None runs it as it is written.
    """

    name = "phase1"
    validation_limit: int | None = None
    validates_answers = False

    def __init__(self, config: TrainConfig, retriever: Retriever) -> None:
        self.config = config
        self.model = retriever
        self.fact_sampler = FactSampler(config.sampler, config.run.seed)
        self.forward = retriever.__call__
        self.replay: StepReplay | None = None

    def _retrieve(self, batch: QuestionBatch, relations: RelationStates) -> RetrieverOutput:
        precision, device = self.config.run.precision, batch.graph.topic_prob.device
        with autocast(precision, device, cache=self.replay is None):
            return self.forward(batch, relations)

    def loss(self, batch: QuestionBatch, relations: RelationStates) -> Tensor:
        """The retrieval loss, summed over the labelled questions of a batch on the device."""
        graph = batch.graph
        output = self._retrieve(batch, relations)
        return retrieval_loss(
            output.fact_logits,
            graph.label,
            graph.fact_ptr,
            rho=self.config.loss.rho,
            margin=self.config.loss.margin,
        )

    def parameter_groups(self) -> list[dict]:
        """One group: the retriever."""
        return [
            {
                "name": "retriever",
                "params": list(self.model.parameters()),
                "lr": self.config.optim.lr,
                "weight_decay": self.config.optim.weight_decay,
            }
        ]

    def counts(self, batches: Sequence[QuestionBatch]) -> dict[str, int]:
        """Labelled questions of the optimizer step."""
        return {"questions": sum(batch.num_labelled for batch in batches)}

    def training_step(
        self, batch: QuestionBatch, relations: RelationStates, counts: dict[str, float], step: int
    ) -> StepOutput:
        """Forward and backward of one micro-batch."""
        graph, questions = batch.graph, counts["questions"]
        if self.replay is not None:
            loss = self.replay(batch, relations, questions)
        else:
            with nvtx_range("copy"):
                batch = batch.to(relations.states.device)
            with nvtx_range("retriever"):
                loss = self.loss(batch, relations) / questions
            with nvtx_range("backward"):
                loss.backward()
            loss = loss.detach()
        return StepOutput(loss, {"retrieval": loss}, graph.num_graphs, graph.num_facts, 0)

    def idle_step(self, device: torch.device) -> StepOutput:
        """Nothing, and zeros for the log."""
        loss = torch.zeros((), device=device)
        return StepOutput(loss, {"retrieval": loss}, 0, 0, 0)

    def check_gradients(self, counts: Mapping[str, int]) -> None:
        """Nothing: no part of the retriever can stay out of its own forward."""

    @torch.no_grad()
    def predict(
        self, batch: QuestionBatch, relations: RelationStates, *, generate: bool = True
    ) -> list[Prediction]:
        """The facts of every question, ranked. There is nothing that could generate."""
        logits = self._retrieve(batch, relations).fact_logits
        return rank_facts(batch, logits, self.fact_sampler.best(logits, batch.graph), None)

    def run_dummy_passes(self) -> None:
        """Ranks need nothing from one another."""

    def trainable_state(self) -> dict[str, Tensor]:
        """The retriever's tensors."""
        return module_tensors(self.model, "retriever")

    def adapter_writer(self) -> None:
        """There is no generator in this phase."""
        return None

    def load(self, loaded: LoadedCheckpoint) -> None:
        """Takes the retriever of a checkpoint."""
        load_tensors_into(self.trainable_state(), loaded.tensors["heads"], what=str(loaded.folder))

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """F1 of the selected facts against the labels; None where no question has labels."""
        return metrics.get("retrieval-f1")
