"""Retriever, sampler, projector and generator as one model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dragkit.config import TrainConfig
from dragkit.data.packed import QuestionBatch
from dragkit.generator.generator import Generator
from dragkit.generator.projector import Projector
from dragkit.generator.prompt import NeuralPrompt, PromptLayout, PromptTemplate, layout_prompts
from dragkit.retriever.fact_sampler import FactSampler, FactSelection
from dragkit.retriever.retriever import Retriever, RetrieverOutput
from dragkit_kernels import segment_sum


class JointModel(nn.Module):
    """D-RAG: p(answer | drawn facts) p(drawn facts | question, graph).

    Args:
        config: the whole configuration; retriever, generator: its parts.
    """

    def __init__(self, config: TrainConfig, retriever: Retriever, generator: Generator) -> None:
        super().__init__()
        self.config = config
        self.retriever = retriever
        self.generator = generator
        self.fact_sampler = FactSampler(config.sampler, config.run.seed)
        self.template = PromptTemplate()
        self.projector = Projector(
            retriever.fact_dim,
            config.generator.projector_dim,
            generator.dim,
            generator.embedding_rms(),
        )
        cue = generator.tokenize([self.template.cue])[0]
        self.register_buffer("cue", torch.tensor(cue, dtype=torch.int32), persistent=False)

    @property
    def uses_vectors(self) -> bool:
        """False in the control arm: text alone."""
        return self.config.generator.structural_vectors

    def structural_vectors(
        self, output: RetrieverOutput, batch: QuestionBatch, selection: FactSelection
    ) -> Tensor:
        """Ungated structural vectors of the selected facts, float [B, K, M]."""
        return self.projector(output, batch.graph, selection.index)

    def gate(self, vectors: Tensor, selection: FactSelection) -> Tensor:
        """Slots of the selected facts: their vectors times their gates, float [B*K, M]."""
        gated = vectors * selection.gate.unsqueeze(-1)
        return gated.to(vectors.dtype).flatten(0, 1)

    def residual(
        self, output: RetrieverOutput, batch: QuestionBatch, selection: FactSelection
    ) -> Tensor:
        """The residual slot of every question, float [B, M]: zero, with a gradient.

        Its value is the sum of soft-gated vectors of the facts that were *not* drawn, minus itself;
        the backward pass hands each of those facts <dL/dslot, its vector>.
        """
        graph = batch.graph
        with torch.no_grad():  # the slot is zero, so no gradient passes to the vectors themselves
            everything = torch.arange(
                graph.num_facts, dtype=torch.int32, device=selection.index.device
            )
            vectors = self.projector(output, graph, everything)
        drawn = torch.zeros(graph.num_facts + 1, device=vectors.device)
        drawn[selection.index.long().flatten()] = 1.0  # -1 lands on the spare last place
        z = selection.soft - selection.soft.detach()
        weighted = vectors * (z * (1.0 - drawn[:-1])).unsqueeze(-1)
        return segment_sum(weighted.to(vectors.dtype), graph.fact_graph, graph.num_graphs)

    def layout(
        self,
        batch: QuestionBatch,
        index: Tensor,
        *,
        with_target: bool,
        vectors: bool | None = None,
        residual: bool = False,
    ) -> PromptLayout:
        """What the prompts of the batch around the selected facts, int32 [B, K], are made of."""
        limit = self.config.generator.max_prompt_tokens
        if batch.prefix is None or batch.facts is None:
            raise ValueError("the batch carries no token rows; build the collator with tokens")
        return layout_prompts(
            batch.prefix,
            batch.facts,
            self.cue,
            batch.target if with_target else None,
            index,
            max_tokens=limit if with_target else limit - self.config.generator.max_new_tokens,
            vectors=self.uses_vectors if vectors is None else vectors,
            residual=residual,
        )

    def prompt(
        self,
        batch: QuestionBatch,
        index: Tensor,
        *,
        with_target: bool,
        vectors: bool | None = None,
    ) -> NeuralPrompt:
        """All prompts of the batch in its order; waits for the device to know their lengths."""
        layout = self.layout(batch, index, with_target=with_target, vectors=vectors)
        return layout.assemble(range(len(index)), *layout.copy_lengths().result())

    @torch.no_grad()
    def generate(
        self,
        batch: QuestionBatch,
        output: RetrieverOutput,
        selection: FactSelection,
        *,
        cascade: bool = False,
    ) -> list[str]:
        """Greedy answers to the batch's questions from the selected facts.

        `cascade` leaves the structural vectors out: retriever and generator side by side, with
        nothing but text between them.
        """
        used = self.uses_vectors and not cascade
        prompt = self.prompt(batch, selection.index, with_target=False, vectors=used)
        vectors = None
        if used:
            vectors = self.structural_vectors(output, batch, selection).flatten(0, 1)
        limit = self.config.run.val_max_new_tokens or self.config.generator.max_new_tokens
        return self.generator.greedy_texts(prompt, vectors, limit)
