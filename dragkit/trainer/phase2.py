"""Phase 2: retriever, projector and the generator's adapters learn together from the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dragkit.checkpoint.checkpoint import LoadedCheckpoint, load_tensors_into
from dragkit.config import TrainConfig
from dragkit.data.packed import QuestionBatch
from dragkit.distributed.ranks import Ranks
from dragkit.errors import ConfigError
from dragkit.eval.types import Prediction
from dragkit.generator.lora.gradient_watch import AdapterWatch
from dragkit.joint import JointModel
from dragkit.retriever.gold_facts import gold_facts
from dragkit.retriever.retriever import RetrieverOutput
from dragkit.retriever.text_encoder import RelationStates
from dragkit.trainer.joint_step import JointStep
from dragkit.trainer.phase import Phase, StepOutput, load_state, module_tensors, rank_facts


class JointPhase(Phase):
    """Trains `JointModel` end to end.

    Args:
        config: the whole configuration.
        model: the joint model.
        ranks: ranks that share a batch. None means this process alone.
        forward: replaces the retriever's forward, such as its compiled form.

    Raises:
        ConfigError: the sampler's estimator needs another generator.

    Attributes:
        text_only: whether `predict` leaves the structural vectors out of the prompts.
        gold_only: whether `predict` puts the positive facts into the prompts, see `gold_facts`.
    """

    name = "phase2"
    text_only = False
    gold_only = False

    def __init__(
        self,
        config: TrainConfig,
        model: JointModel,
        *,
        ranks: Ranks | None = None,
        forward: Callable[..., RetrieverOutput] | None = None,
    ) -> None:
        super().__init__(config)
        self.model = model
        self.ranks = ranks or Ranks()
        if config.sampler.estimator == "soft_gates" and not model.generator.is_packed:
            raise ConfigError(
                f"sampler.estimator: soft_gates was given, but {config.generator_model} is not a "
                "Nemotron-H, whose tokens can have gates. Use leave_one_out."
            )
        self.forward = model.retriever.__call__ if forward is None else forward
        if not config.optim.retriever_lr_scale:
            model.retriever.requires_grad_(False)
        self.step = JointStep(config, model, self.ranks, self.retrieve, self.retrieval_loss)
        self.watch = AdapterWatch(model.generator.model)
        self.validates_answers = config.run.val_generation
        limit = config.run.val_generation_limit
        self.validation_limit = limit if self.validates_answers else None

    def parameter_groups(self) -> list[dict]:
        """Retriever, projector and adapters, each with its learning rate."""
        optim, model = self.config.optim, self.model
        retriever = list(model.retriever.parameters()) if optim.retriever_lr_scale else []
        projector = list(model.projector.parameters()) if model.uses_vectors else []
        adapters = [p for p in model.generator.parameters() if p.requires_grad]
        groups = [
            ("retriever", retriever, optim.lr * optim.retriever_lr_scale, optim.weight_decay),
            ("projector", projector, optim.lr * optim.projector_lr_scale, optim.weight_decay),
            ("lora", adapters, optim.adapter_lr, 0.0),
        ]
        return [
            {"name": name, "params": params, "lr": lr, "weight_decay": weight_decay}
            for name, params, lr, weight_decay in groups
            if params
        ]

    def counts(self, batches: Sequence[QuestionBatch]) -> dict[str, int]:
        """Labelled questions and supervised tokens of the optimizer step."""
        return {
            "questions": sum(batch.num_labelled for batch in batches),
            "tokens": sum(b.target.ids.numel() for b in batches if b.target is not None),
        }

    def training_step(
        self, batch: QuestionBatch, relations: RelationStates, counts: dict[str, float], step: int
    ) -> StepOutput:
        """See `JointStep.run`."""
        return self.step.run(batch, relations, counts, step)

    def idle_step(self, device: torch.device) -> StepOutput:
        """Takes part in the collectives of `training_step`, with zeros."""
        zero = torch.zeros((), device=device)
        self.model.generator.run_dummy_passes(vectors=self.model.uses_vectors)
        if self.step.balances:
            self.ranks.all_reduce_(torch.zeros(2, device=device))
        parts = dict.fromkeys(("generator", "retrieval", "token_accuracy"), zero)
        return StepOutput(zero, parts, 0, 0, 0)

    def check_gradients(self, counts: Mapping[str, int]) -> None:
        """Checks that every adapter has a gradient, see `AdapterWatch`."""
        self.watch.check(counts["tokens"])

    @torch.no_grad()
    def predict(
        self, batch: QuestionBatch, relations: RelationStates, *, generate: bool = True
    ) -> list[Prediction]:
        """Ranked facts of every question and, with `generate`, a greedy answer."""
        output = self.retrieve(batch, relations)
        selection = self.model.fact_sampler.best(output.fact_logits, batch.graph)
        if self.gold_only:
            selection = gold_facts(output.fact_logits, batch.graph, selection)
        if not generate:
            return rank_facts(batch, output.fact_logits, selection)
        answers = self.model.generate(batch, output, selection, text_only=self.text_only)
        return rank_facts(batch, output.fact_logits, selection, *answers)

    def run_dummy_passes(self) -> None:
        """Runs passes so that ranks that still generate can all-gather this rank's shards."""
        self.model.generator.run_dummy_passes()

    def trainable_state(self) -> dict[str, Tensor]:
        """The tensors of retriever and projector. `adapter_writer` writes the adapters."""
        return module_tensors(self.model.retriever, "retriever") | module_tensors(
            self.model.projector, "projector"
        )

    def adapter_writer(self) -> Callable[[Path], None] | None:
        """The function that writes the adapters in PEFT's layout, or None without adapters."""
        if not self.model.generator.has_adapters:
            return None
        return self.model.generator.save_adapters

    def load(self, loaded: LoadedCheckpoint) -> None:
        """Copies retriever, projector and adapters of a phase 2 checkpoint into the model."""
        super().load(loaded)
        if self.model.generator.has_adapters:
            folder = loaded.folder / "adapter"
            load_tensors_into(
                self.model.generator.adapter_state(),
                load_file(folder / "adapter_model.safetensors"),
                what=str(folder),
            )

    def load_retriever(self, loaded: LoadedCheckpoint) -> None:
        """Copies the retriever of a checkpoint of either phase into the model."""
        load_state(module_tensors(self.model.retriever, "retriever"), loaded, "retriever.")

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """F1 of the answer sets, or of the facts where no answers are generated."""
        return metrics.get("strict-f1", metrics.get("retrieval-f1"))


class CascadeBaseline(JointPhase):
    """Predicts with retriever and generator in sequence: facts enter the prompts as text alone."""

    text_only = True
