"""Phase 1: the retriever alone learns which facts lie on shortest paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dragkit.config import TrainConfig
from dragkit.data.packed import QuestionBatch
from dragkit.eval.types import Prediction
from dragkit.observe.profiling import nvtx_range
from dragkit.retriever.fact_sampler import FactSampler
from dragkit.retriever.retriever import Retriever, RetrieverOutput
from dragkit.retriever.text_encoder import RelationStates
from dragkit.trainer.phase import Phase, StepOutput, module_tensors, rank_facts
from dragkit.trainer.replay import BatchLoss, StepReplay


class RetrieverPhase(Phase):
    """Trains `Retriever` with cross-entropy and a ranking loss on the fact labels.

    Args:
        config: the whole configuration.
        retriever: the model.
        forward: replaces the model's forward, such as its compiled form.
        make_replay: builds the replay of the training step. None runs each step eagerly.
    """

    name = "phase1"

    def __init__(
        self,
        config: TrainConfig,
        retriever: Retriever,
        *,
        forward: Callable[..., RetrieverOutput] | None = None,
        make_replay: Callable[[BatchLoss, list[nn.Parameter]], StepReplay] | None = None,
    ) -> None:
        super().__init__(config)
        self.model = retriever
        self.fact_sampler = FactSampler(config.sampler, config.run.seed)
        self.forward = retriever.__call__ if forward is None else forward
        self.replay: StepReplay | None = None
        if make_replay is not None:
            self.replay = make_replay(self.loss, list(retriever.parameters()))
        # The replay copies a batch into the input buffer of a CUDA graph.
        self.takes_host_batches = self.replay is not None

    def loss(self, batch: QuestionBatch, relations: RelationStates) -> Tensor:
        """The loss of a device batch, float32 [], summed over its labelled questions."""
        # The casts of the weights must be part of the CUDA graph, not come from autocast's cache.
        output = self.retrieve(batch, relations, cache=self.replay is None)
        return self.retrieval_loss(output.fact_logits, batch.graph)

    def parameter_groups(self) -> list[dict]:
        """One group with all parameters of the retriever."""
        params, optim = list(self.model.parameters()), self.config.optim
        weight_decay = optim.weight_decay
        return [
            {"name": "retriever", "params": params, "lr": optim.lr, "weight_decay": weight_decay}
        ]

    def counts(self, batches: Sequence[QuestionBatch]) -> dict[str, int]:
        """Labelled questions of the optimizer step."""
        return {"questions": sum(batch.num_labelled for batch in batches)}

    def training_step(
        self, batch: QuestionBatch, relations: RelationStates, counts: dict[str, float], step: int
    ) -> StepOutput:
        """Runs forward and backward of one micro-batch, see `Phase.training_step`."""
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
        """Returns zeros for the log."""
        loss = torch.zeros((), device=device)
        return StepOutput(loss, {"retrieval": loss}, 0, 0, 0)

    def check_gradients(self, counts: Mapping[str, int]) -> None:
        """Checks nothing, since phase 1 has no adapters."""

    @torch.no_grad()
    def predict(
        self, batch: QuestionBatch, relations: RelationStates, *, generate: bool = True
    ) -> list[Prediction]:
        """Ranked facts of every question, without answers."""
        logits = self.retrieve(batch, relations).fact_logits
        return rank_facts(batch, logits, self.fact_sampler.best(logits, batch.graph))

    def run_dummy_passes(self) -> None:
        """Does nothing, since ranks do not share the retriever's weights."""

    def trainable_state(self) -> dict[str, Tensor]:
        """The retriever's tensors."""
        return module_tensors(self.model, "retriever")

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """F1 of the selected facts against the labels. It is None where no question has labels."""
        return metrics.get("retrieval-f1")
