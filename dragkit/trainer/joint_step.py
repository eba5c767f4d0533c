"""One training step of phase 2: the forward, and the backward in its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dragkit.config import TrainConfig
from dragkit.data.packed import PackedGraph, QuestionBatch
from dragkit.distributed.ranks import Ranks
from dragkit.generator.nemotron_h import split_by_tokens
from dragkit.generator.prompt import PromptLayout
from dragkit.generator.to_host import AsyncToHost, to_device
from dragkit.joint import JointModel
from dragkit.observe.profiling import nvtx_range
from dragkit.retriever.fact_sampler import FactSelection
from dragkit.retriever.losses import (
    balance_weight,
    draw_gradient,
    leave_one_out_weight,
    posterior_weight,
)
from dragkit.retriever.retriever import RetrieverOutput
from dragkit.retriever.text_encoder import RelationStates
from dragkit.trainer.compile import autocast
from dragkit.trainer.phase import StepOutput


class Draft(NamedTuple):
    """The forward of a micro-batch up to the generator, see `JointStep.run`.

    Attributes:
        logits: float [E] leaf of cut 1.
        score: float [M, E] score function of the M draws, with "leave_one_out".
        gates: float [M * B, K] leaf of the gates of whole facts, with "soft_gates".
        lengths: prompt lengths, while they are copied to the host.
        vectors: float [M, B, K, W] of the drawn facts, with the generator's width W. It is None
            where prompts are text alone.
        slots: float [S, W] gated vectors.
        leaf: float [S, W] leaf of cut 2.
    """

    output: RetrieverOutput
    logits: Tensor
    selection: FactSelection
    score: Tensor | None
    gates: Tensor | None
    fact_graph: Tensor
    layout: PromptLayout
    lengths: AsyncToHost
    vectors: Tensor | None
    slots: Tensor | None
    leaf: Tensor | None


class JointStep:
    """Runs forward and backward of a micro-batch.

    Args:
        config: the whole configuration.
        model: the joint model.
        ranks: ranks that share a batch.
        retrieve: the retriever's forward in the run's precision.
        retrieval_loss: the retrieval loss, summed over the labelled questions of a graph.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: JointModel,
        ranks: Ranks,
        retrieve: Callable[[QuestionBatch, RelationStates], RetrieverOutput],
        retrieval_loss: Callable[[Tensor, PackedGraph], Tensor],
    ) -> None:
        self.config, self.model, self.ranks = config, model, ranks
        self.retrieve, self.retrieval_loss = retrieve, retrieval_loss

    def run(
        self, batch: QuestionBatch, relations: RelationStates, counts: dict[str, float], step: int
    ) -> StepOutput:
        """Runs forward and backward of one micro-batch, with three cuts in the autograd graph.

        ::

            retriever --> fact_logits =1= logits --+--> retrieval loss
                |                                  |
                |                              fact_sampler (M draws)
                |                                  | gate
                +--> projector --> vectors =3=-----+--> slots =2= leaf --> generator --> answer loss

        Without gates (`leave_one_out`) the answer losses of a question's M draws give the gradient
        at `logits`. `loss.generator_gradient` closes the way through the draw or through `vectors`.

        Cut 2 (`detach`) lets the generator run forward and backward in micro-batches of prompts,
        whose gradients add up in `leaf`. Cut 1 (`detach`) is where the gradients of both losses
        meet, so they can be balanced by their norms. Cut 3 is where the backward from `slots` stops
        (`torch.autograd.grad`), so that the retriever runs one backward, from `fact_logits` and
        `vectors` together.

        The host waits for the device once, in `generator_backward`, for the prompt lengths.
        """
        with nvtx_range("copy"):
            batch = batch.to(relations.states.device)
        graph = batch.graph
        draft = self.draw_and_prompt(batch, relations, step)
        # Queue this before the host waits, so that the device has work meanwhile.
        with nvtx_range("backward"):
            retrieval = self.retrieval_loss(draft.logits, graph) / counts["questions"]
            (label_grad,) = torch.autograd.grad(retrieval, draft.logits)
        nats, num_correct, num_tokens = self.generator_backward(draft, counts["tokens"])
        draw_weight = None
        if draft.score is not None:
            is_marginal = self.config.loss.draw_objective == "marginal"
            weigh = posterior_weight if is_marginal else leave_one_out_weight
            draw_weight = weigh(nats) / counts["tokens"]
        generator_grad, weight = self.retriever_backward(draft, label_grad, draw_weight)
        draws = len(nats)
        generator_loss = nats.sum() / (counts["tokens"] * draws)
        retrieval, left_out = retrieval.detach(), draft.layout.left_out
        parts = {
            "generator": generator_loss,
            "retrieval": retrieval,
            "token_accuracy": num_correct / (counts["tokens"] * draws),
            "facts_kept": draft.selection.count.float().sum() / (graph.num_graphs * draws),
            # Chosen facts without room in a prompt, and the fraction of prompts with such facts.
            "facts_left_out": left_out.sum() / len(left_out),
            "prompts_cut": left_out.any(1).float().mean(),
        }
        if self.config.run.log_grad_norms and step % self.config.run.grad_norm_log_interval == 0:
            parts["grad_norm_generator"] = generator_grad.norm()
            parts["grad_norm_retrieval"] = label_grad.norm()
            parts["retrieval_weight"] = weight
        loss = generator_loss + weight * retrieval
        return StepOutput(loss, parts, graph.num_graphs, graph.num_facts, num_tokens)

    def draw_and_prompt(self, batch: QuestionBatch, relations: RelationStates, step: int) -> Draft:
        """Scores and draws facts, lays out the prompts, and computes what fills their slots."""
        model, config = self.model, self.config
        with nvtx_range("retriever"):
            output = self.retrieve(batch, relations)
        logits = output.fact_logits.detach().requires_grad_()
        with nvtx_range("sampler"):
            selection, score = model.fact_sampler.draw(logits, batch.graph, step)
            gates = None
            if config.sampler.estimator == "soft_gates":
                gates = selection.gate.detach().flatten(0, 1).requires_grad_()
        with nvtx_range("prompt"):
            layout = model.layout(batch, selection.index, with_target=True)
            # The copy starts before the vectors are queued, so that it ends early.
            lengths = layout.copy_lengths()
            vectors = slots = leaf = None
            if model.uses_vectors:
                with autocast(config.run.precision, logits.device):
                    vectors = model.structural_vectors(output, batch, selection)
                    slots = vectors.flatten(0, -2)
                    if self._gates_vectors:
                        slots = model.apply_gate(vectors, selection)
                leaf = slots.detach().requires_grad_()
        return Draft(
            output,
            logits,
            selection,
            score,
            gates,
            batch.graph.fact_graph,
            layout,
            lengths,
            vectors,
            slots,
            leaf,
        )

    def generator_backward(self, draft: Draft, tokens: float) -> tuple[Tensor, Tensor, int]:
        """Runs the generator on micro-batches of prompts, forward and backward.

        Gradients accumulate in the adapters and in `draft.leaf`.

        Returns:
            Answer loss of each draw and question in nats, float32 [M, B], number of tokens that
            were right, int64 [], and number of prompt tokens.
        """
        generator, device = self.model.generator, self.model.cue.device
        loss = torch.zeros(draft.selection.count.shape, device=device)
        denominator = tokens * len(loss)
        num_correct = torch.zeros((), dtype=torch.int64, device=device)
        with nvtx_range("wait"):
            lengths, supervised = draft.lengths.result()
        for rows in self.microbatches(lengths):
            prompt = draft.layout.assemble(rows, lengths, supervised, draft.gates)
            with nvtx_range("generator"):
                out = generator(prompt, draft.leaf, self.config.loss.eos_loss_weight)
            # All micro-batches share one denominator, so that their split does not matter.
            microbatch_loss = out.loss_sum / denominator
            # Without adapters and without vectors nothing is trained through the generator.
            if microbatch_loss.requires_grad:
                with nvtx_range("backward"):
                    microbatch_loss.backward()
            (index,) = to_device(device, np.asarray(rows))
            loss.view(-1)[index] = out.prompt_loss
            num_correct = num_correct + out.num_correct
        generator.run_dummy_passes(vectors=self.model.uses_vectors)
        return loss, num_correct, sum(lengths)

    def microbatches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Prompts of each generator micro-batch, short prompts first where there are several."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        max_prompts = max(self.config.generator.generator_microbatch or len(order), 1)
        max_tokens = self.model.generator.max_tokens_per_microbatch
        sizes = split_by_tokens([lengths[i] for i in order], max_tokens, max_prompts)
        # A single micro-batch keeps the order of the batch.
        if len(sizes) == 1:
            return [list(range(len(order)))]
        remaining = iter(order)
        return [list(islice(remaining, size)) for size in sizes]

    def retriever_backward(
        self, draft: Draft, label_grad: Tensor, draw_weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Runs the backward of sampler, projector and retriever.

        Args:
            draft: the forward.
            label_grad: float [E] gradient of the retrieval loss at `logits`.
            draw_weight: float [M, B] weight of each draw's score, with "leave_one_out".

        Returns:
            Gradient of the answer loss at `logits`, float [E], and the retrieval loss's weight, [].
        """
        logits, vectors, leaf = draft.logits, draft.vectors, draft.leaf
        with nvtx_range("backward"):
            roots, grads, generator_grad = [], [], None
            if leaf is not None and leaf.grad is not None:
                # Where all subgraphs of the batch are empty, vectors have no autograd graph.
                inputs = [logits, vectors] if vectors.requires_grad else [logits]
                generator_grad, *grads = torch.autograd.grad(
                    draft.slots, inputs, leaf.grad, allow_unused=True
                )
                roots = inputs[1:]
            if not self._gates_vectors:
                generator_grad = self._draw_gradient(draft, draw_weight)
            if generator_grad is None or not self._draw_learns:
                generator_grad = torch.zeros_like(logits)
            # A device tensor, like the balanced weight, so that the log needs no second case.
            weight = torch.full((), self.config.loss.ret_loss_weight, device=logits.device)
            if self.balances:
                weight = self._balance(generator_grad, label_grad)
            if draft.output.fact_logits.requires_grad:
                roots = [draft.output.fact_logits, *roots]
                grads = [generator_grad + weight * label_grad, *grads]
            if roots:
                torch.autograd.backward(roots, grads)
        return generator_grad, weight

    @staticmethod
    def _draw_gradient(draft: Draft, weight: Tensor | None) -> Tensor | None:
        """Gradient of the answer loss at `logits` by score function or soft gates, float [E]."""
        if draft.score is not None and weight is not None:
            return draw_gradient(weight, draft.score, draft.fact_graph)
        if draft.gates is None or draft.gates.grad is None:
            return None
        gate = draft.selection.gate.flatten(0, 1)
        return torch.autograd.grad(gate, draft.logits, draft.gates.grad)[0]

    @property
    def _draw_learns(self) -> bool:
        """Whether the answer loss has a gradient at the fact logits."""
        opened = self.config.loss.generator_gradient in ("both", "gates")
        return opened and (self.model.uses_vectors or not self._gates_vectors)

    @property
    def _gates_vectors(self) -> bool:
        """Whether the draw has its gradient through gates of the structural vectors."""
        return self.config.sampler.estimator in ("binary_concrete", "straight_through")

    @property
    def balances(self) -> bool:
        """Whether the weight of the retrieval loss follows from the gradient norms."""
        return self.config.loss.use_grad_norm_balance and self._draw_learns

    def _balance(self, generator_grad: Tensor, label_grad: Tensor) -> Tensor:
        """Weight of the retrieval loss, [], from the norms of both gradients over all ranks."""
        if not self.ranks.is_single:
            # Squared norms add up over ranks, norms do not.
            squares = torch.stack([generator_grad.square().sum(), label_grad.square().sum()])
            self.ranks.all_reduce_(squares)
            generator_grad, label_grad = squares.sqrt()
        return balance_weight(generator_grad, label_grad, self.config.loss.balance_rho)
