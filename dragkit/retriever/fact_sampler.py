"""Selects facts for the prompt: differentiable draws in training, the best facts at inference."""

from __future__ import annotations

import torch
from torch import Tensor

from dragkit.config import SamplerConfig
from dragkit.data.packed import PackedGraph
from dragkit_kernels import FactSelection, draw_score, gumbel_topk, logistic_noise, top_facts


class FactSampler:
    """Draws subgraphs (docs/method.md, section 6).

    Args:
        config: mode, estimator, number of draws, temperature, cap and inference threshold.
        seed: seed of the noise. A draw is a function of (seed, step, question, fact).
    """

    def __init__(self, config: SamplerConfig, seed: int) -> None:
        self.config = config
        self.seed = seed

    def _step_seed(self, step: int, device: torch.device) -> Tensor:
        # Low word: step. High word: seed. Philox mixes the two words of its key.
        word = (self.seed << 32) | (step & 0xFFFFFFFF)
        signed = word - (1 << 64) if word >= 1 << 63 else word
        # `full` writes the number on the device. Copying it there would make the host wait.
        return torch.full((), signed, dtype=torch.int64, device=device)

    @property
    def has_gates(self) -> bool:
        """Whether gradients pass through the gates of the drawn facts."""
        return self.config.estimator != "leave_one_out"

    def draw(
        self, logits: Tensor, graph: PackedGraph, step: int
    ) -> tuple[FactSelection, Tensor | None]:
        """Draws M = `num_draws` random subgraphs per graph.

        Args:
            logits: float32 [E].
            graph: the pack.
            step: index of the optimizer step.

        Returns:
            The facts of the draws, whose fields begin with the dimension M, and with
            "leave_one_out" their score function, float32 [M, E], see `draw_score`.
        """
        config = self.config
        noise = logistic_noise(
            self._step_seed(step, logits.device),
            graph.question_key,
            graph.fact_ptr,
            num_facts=graph.num_facts,
            num_draws=config.num_draws,
        )
        selection = gumbel_topk(
            logits if self.has_gates else logits.detach(),
            graph.fact_ptr,
            config.k_facts,
            temperature=config.temperature,
            noise=noise,
            mode=config.mode,
            estimator=config.estimator if self.has_gates else "straight_through",
            max_facts=graph.max_facts,
        )
        if self.has_gates:
            return selection, None
        return selection, draw_score(logits, noise, graph.fact_ptr, config.k_facts, config.mode)

    def best(self, logits: Tensor, graph: PackedGraph) -> FactSelection:
        """Selects the `k_facts` most probable facts above the threshold, at least one per graph."""
        return top_facts(
            logits,
            graph.fact_ptr,
            self.config.k_facts,
            threshold=self.config.prob_threshold,
            max_facts=graph.max_facts,
        )
