"""Phase 2: retriever, projector and the generator's adapters learn together from the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dragkit.checkpoint.checkpoint import LoadedCheckpoint, load_tensors_into
from dragkit.config import TrainConfig
from dragkit.data.packed import PackedGraph, QuestionBatch
from dragkit.distributed.ranks import Ranks
from dragkit.eval.types import Prediction
from dragkit.generator.lora.gradient_watch import AdapterWatch
from dragkit.generator.nemotron_h import split_by_tokens
from dragkit.generator.prompt import NeuralPrompt
from dragkit.joint import JointModel
from dragkit.observe.profiling import nvtx_range
from dragkit.retriever.losses import balance_weight, retrieval_loss
from dragkit.retriever.retriever import RetrieverOutput
from dragkit.retriever.text_encoder import RelationStates
from dragkit.trainer.compile import autocast
from dragkit.trainer.phase import StepOutput
from dragkit.trainer.phase1 import module_tensors, rank_facts


def _answer_tokens(batches: Sequence[QuestionBatch]) -> int:
    return sum(b.target.ids.numel() for b in batches if b.target is not None)


class JointPhase:
    """Trains `JointModel` end to end.

    The graph is cut twice: at the structural vectors, so that the generator may run in
    micro-batches of questions, and at the fact logits, where the gradients of the generator and of
    the retrieval loss meet and can be balanced by their norms without a second pass.

    Args:
        config: the whole configuration; model: the joint model.

    Attributes:
        ranks: those that share a batch, whose gradients are balanced together.
    """

    name = "phase2"

    def __init__(self, config: TrainConfig, model: JointModel) -> None:
        self.config = config
        self.model = model
        self.watch = AdapterWatch(model.generator.model)
        self.ranks = Ranks()
        self.forward = model.retriever.__call__
        self.cascade = False
        self.validates_answers = config.run.val_generation
        limit = config.run.val_generation_limit
        self.validation_limit = limit if self.validates_answers else None

    def _retrieve(self, batch: QuestionBatch, relations: RelationStates) -> RetrieverOutput:
        with autocast(self.config.run.precision, batch.graph.topic_prob.device):
            return self.forward(batch, relations)

    def parameter_groups(self) -> list[dict]:
        """Retriever, projector and adapters, each with its own learning rate."""
        optim = self.config.optim
        adapters = [p for p in self.model.generator.parameters() if p.requires_grad]
        groups = [
            ("retriever", list(self.model.retriever.parameters()), optim.lr, optim.weight_decay),
            (
                "projector",
                list(self.model.projector.parameters()),
                optim.lr * optim.projector_lr_scale,
                optim.weight_decay,
            ),
            ("lora", adapters, optim.adapter_lr, 0.0),
        ]
        return [
            {"name": name, "params": params, "lr": lr, "weight_decay": decay}
            for name, params, lr, decay in groups
            if params and (name != "projector" or self.model.uses_vectors)
        ]

    def counts(self, batches: Sequence[QuestionBatch]) -> dict[str, int]:
        """Labelled questions and supervised tokens of the optimizer step."""
        labelled = sum(batch.num_labelled for batch in batches)
        return {"questions": labelled, "tokens": _answer_tokens(batches)}

    def _balance(self, from_generator: Tensor, from_labels: Tensor) -> Tensor:
        """Weight of the retrieval loss by the norms of both gradients, over all ranks."""
        if not self.ranks.is_single:
            squares = torch.stack([from_generator.square().sum(), from_labels.square().sum()])
            self.ranks.all_reduce_(squares)
            from_generator, from_labels = squares.sqrt()
        return balance_weight(from_generator, from_labels, self.config.loss.balance_rho)

    @property
    def _balances(self) -> bool:
        return self.config.loss.use_grad_norm_balance and self.model.uses_vectors

    def _passes(self, lengths: Sequence[int]) -> list[list[int]]:
        """Prompts of each pass, short ones first where there are several passes."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        count = max(self.config.generator.generator_microbatch or len(order), 1)
        tokens = self.model.generator.max_tokens_per_microbatch
        sizes = split_by_tokens([lengths[i] for i in order], tokens, count)
        if len(sizes) == 1:
            return [list(range(len(order)))]
        following = iter(order)
        return [list(islice(following, size)) for size in sizes]

    def _generator_passes(
        self, prompts: Iterable[NeuralPrompt], vectors: Tensor | None, tokens: float
    ) -> tuple[Tensor, Tensor]:
        """Forward and backward of the generator; gradients reach adapters and `vectors`."""
        device = self.model.cue.device
        loss = torch.zeros((), device=device)
        correct = torch.zeros((), dtype=torch.int64, device=device)
        for prompt in prompts:
            with nvtx_range("generator"):
                out = self.model.generator(prompt, vectors, self.config.loss.eos_loss_weight)
            share = out.loss_sum / tokens
            if share.requires_grad:
                with nvtx_range("backward"):
                    share.backward()
            loss = loss + share.detach()
            correct = correct + out.num_correct
        self.model.generator.run_dummy_passes(vectors=self.model.uses_vectors)
        return loss, correct

    def _retrieval_loss(self, logits: Tensor, graph: PackedGraph, questions: float) -> Tensor:
        loss = self.config.loss
        found = retrieval_loss(
            logits,
            graph.label,
            graph.fact_ptr,
            rho=loss.rho,
            margin=loss.margin,
        )
        return found / questions

    def training_step(
        self, batch: QuestionBatch, relations: RelationStates, counts: dict[str, float], step: int
    ) -> StepOutput:
        """Forward and backward of one micro-batch.

        The host waits for the device once, for the lengths of the prompts, with all work queued
        that does not depend on them.
        """
        with nvtx_range("copy"):
            batch = batch.to(relations.states.device)
        model, graph, config = self.model, batch.graph, self.config
        with nvtx_range("retriever"):
            output = self._retrieve(batch, relations)
        logits = output.fact_logits.detach().requires_grad_()
        with nvtx_range("sampler"):
            selection = model.fact_sampler.draw(logits, graph, step)
        residual = config.sampler.undrawn_facts_vector and model.uses_vectors
        with nvtx_range("prompt"):
            layout = model.layout(batch, selection.index, with_target=True, residual=residual)
            sizes = layout.copy_lengths()
            ungated, slots = None, None
            if model.uses_vectors:
                with autocast(config.run.precision, logits.device):
                    ungated = model.structural_vectors(output, batch, selection)
                    slots = model.gate(ungated, selection)
                    if residual:
                        slots = torch.cat([slots, model.residual(output, batch, selection)])
        with nvtx_range("backward"):
            retrieval = self._retrieval_loss(logits, graph, counts["questions"])
            (from_labels,) = torch.autograd.grad(retrieval, logits)
        with nvtx_range("wait"):
            lengths, supervised = sizes.result()
        leaf = None if slots is None else slots.detach().requires_grad_()
        prompts = (layout.assemble(p, lengths, supervised) for p in self._passes(lengths))
        generator_loss, correct = self._generator_passes(prompts, leaf, counts["tokens"])

        with nvtx_range("backward"):
            roots, gradients = [output.fact_logits], []
            from_generator = torch.zeros_like(logits)
            if leaf is not None and leaf.grad is not None:
                # Both cuts at once: what reaches the logits stops there, what reaches the vectors
                # waits for the retriever's pass.
                ends = [logits, ungated] if ungated.requires_grad else [logits]
                found, *own = torch.autograd.grad(slots, ends, leaf.grad, allow_unused=True)
                from_generator = from_generator if found is None else found
                roots += ends[1:]  # none where every graph of the batch is empty
                gradients += own
            weight = torch.full((), config.loss.ret_loss_weight, device=logits.device)
            if self._balances:
                weight = self._balance(from_generator, from_labels)
            total = from_generator + weight * from_labels
            torch.autograd.backward(roots, [total, *gradients])
        retrieval = retrieval.detach()
        parts = {
            "generator": generator_loss,
            "retrieval": retrieval,
            "token_accuracy": correct / counts["tokens"],
            "facts_kept": selection.count.float().sum() / graph.num_graphs,
        }
        if config.run.log_grad_norms and step % config.run.grad_norm_log_interval == 0:
            parts["grad_norm_generator"] = from_generator.norm()
            parts["grad_norm_retrieval"] = from_labels.norm()
            parts["retrieval_weight"] = weight
        return StepOutput(
            loss=generator_loss + weight * retrieval,
            parts=parts,
            num_questions=graph.num_graphs,
            num_facts=graph.num_facts,
            num_tokens=sum(lengths),
        )

    def idle_step(self, device: torch.device) -> StepOutput:
        """Takes part in what the ranks add up, with zeros."""
        zero = torch.zeros((), device=device)
        self.model.generator.run_dummy_passes(vectors=self.model.uses_vectors)
        if self._balances:
            self.ranks.all_reduce_(torch.zeros(2, device=device))
        parts = dict.fromkeys(("generator", "retrieval", "token_accuracy"), zero)
        return StepOutput(zero, parts, 0, 0, 0)

    def check_gradients(self, counts: Mapping[str, int]) -> None:
        """Sees to it that training reaches every adapter."""
        self.watch.check(counts["tokens"])

    @torch.no_grad()
    def predict(
        self, batch: QuestionBatch, relations: RelationStates, *, generate: bool = True
    ) -> list[Prediction]:
        """Ranked facts and, where `generate` is set, a greedy answer for every question."""
        output = self._retrieve(batch, relations)
        selection = self.model.fact_sampler.best(output.fact_logits, batch.graph)
        texts = None
        if generate:
            texts = self.model.generate(batch, output, selection, cascade=self.cascade)
        return rank_facts(batch, output.fact_logits, selection, texts)

    def run_dummy_passes(self) -> None:
        """Helps ranks that still generate to the weights that this one has of theirs."""
        self.model.generator.run_dummy_passes()

    def trainable_state(self) -> dict[str, Tensor]:
        """The tensors of retriever and projector."""
        return module_tensors(self.model.retriever, "retriever") | module_tensors(
            self.model.projector, "projector"
        )

    def adapter_writer(self) -> Callable[[Path], None] | None:
        """Writes the LoRA adapters in PEFT's own layout."""
        if not self.model.generator.has_adapters:
            return None
        return self.model.generator.save_adapters

    def load(self, loaded: LoadedCheckpoint) -> None:
        """Takes heads and adapters of a checkpoint of this phase."""
        load_tensors_into(self.trainable_state(), loaded.tensors["heads"], what=str(loaded.folder))
        if self.model.generator.has_adapters:
            folder = loaded.folder / "adapter"
            load_tensors_into(
                self.model.generator.adapter_state(),
                load_file(folder / "adapter_model.safetensors"),
                what=str(folder),
            )

    def load_retriever(self, loaded: LoadedCheckpoint) -> None:
        """Takes the retriever of a checkpoint of either phase."""
        heads = {k: v for k, v in loaded.tensors["heads"].items() if k.startswith("retriever.")}
        own = module_tensors(self.model.retriever, "retriever")
        load_tensors_into(own, heads, what=str(loaded.folder))

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """F1 of the answer sets, or of the facts where no answers are generated."""
        return metrics.get("strict-f1", metrics.get("retrieval-f1"))
