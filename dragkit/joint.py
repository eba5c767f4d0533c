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


class JointModel(nn.Module):
    """D-RAG: p(answer | drawn facts) p(drawn facts | question, graph)."""

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
        """Whether prompts have structural vectors. Those of the control arm are text alone."""
        return self.config.generator.structural_vectors

    def structural_vectors(
        self, output: RetrieverOutput, batch: QuestionBatch, selection: FactSelection
    ) -> Tensor:
        """Projects the selected facts, int32 [..., K], to structural vectors without gates.

        Returns:
            float [..., K, width of the generator].
        """
        if self.config.loss.generator_gradient not in ("both", "vectors"):
            # The projector still learns.
            output = output._replace(node=output.node.detach(), relation=output.relation.detach())
        return self.projector(output, batch.graph, selection.index)

    def apply_gate(self, vectors: Tensor, selection: FactSelection) -> Tensor:
        """Multiplies each structural vector by its gate and returns one row for each."""
        # The gate is float32, so the product may be, too.
        gated = vectors * selection.gate.unsqueeze(-1)
        return gated.to(vectors.dtype).flatten(0, -2)

    def layout(
        self,
        batch: QuestionBatch,
        index: Tensor,
        *,
        with_target: bool,
        vectors: bool | None = None,
    ) -> PromptLayout:
        """Lays out one prompt per question and draw around the selected facts.

        Args:
            batch: the questions.
            index: int32 [B, K] or [M, B, K] their facts. -1 means no fact.
            with_target: append the answers, for training.
            vectors: one vector slot per fact. None follows the configuration.
        """
        limit = self.config.generator.max_prompt_tokens
        if batch.prefix is None or batch.facts is None:
            raise ValueError("the batch has no token rows: build its PackedCollator with TokenRows")
        vectors = self.uses_vectors if vectors is None else vectors
        # A prompt to be continued leaves room for the new tokens, also where validation asks for
        # more of them.
        run, generator = self.config.run, self.config.generator
        answer = max(generator.max_new_tokens, run.val_max_new_tokens or 0)
        return layout_prompts(
            batch.prefix,
            batch.facts,
            self.cue,
            batch.target if with_target else None,
            index,
            max_tokens=limit if with_target else limit - answer,
            vectors=vectors,
            # The cascade, which has no vectors, reads the text in every arm.
            text=self.config.generator.fact_text or not vectors,
        )

    def prompt(
        self, batch: QuestionBatch, index: Tensor, *, with_target: bool, vectors: bool | None = None
    ) -> NeuralPrompt:
        """All prompts of the batch, see `layout`. The host waits for the prompt lengths."""
        layout = self.layout(batch, index, with_target=with_target, vectors=vectors)
        return layout.assemble(range(len(layout.end)), *layout.copy_lengths().result())

    @torch.no_grad()
    def generate(
        self,
        batch: QuestionBatch,
        output: RetrieverOutput,
        selection: FactSelection,
        *,
        text_only: bool = False,
    ) -> tuple[list[str], Tensor]:
        """Greedy answers from the selected facts. `text_only` leaves structural vectors out.

        Returns:
            A text for each question, and the facts without room in its prompt, bool [B, K].
        """
        with_vectors = self.uses_vectors and not text_only
        layout = self.layout(batch, selection.index, with_target=False, vectors=with_vectors)
        prompt = layout.assemble(range(len(layout.end)), *layout.copy_lengths().result())
        vectors = None
        if with_vectors:
            vectors = self.structural_vectors(output, batch, selection).flatten(0, 1)
        limit = self.config.run.val_max_new_tokens or self.config.generator.max_new_tokens
        return self.generator.greedy_texts(prompt, vectors, limit), layout.left_out
