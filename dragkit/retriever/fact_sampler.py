"""Selects facts for the prompt: differentiable draws in training, the best facts at inference."""

from __future__ import annotations

import torch
from torch import Tensor

from dragkit.config import SamplerConfig
from dragkit.data.packed import PackedGraph
from dragkit_kernels import FactSelection, gumbel_topk, top_facts


class FactSampler:
    """Draws subgraphs (docs/method.md, section 6).

    Args:
        config: mode, estimator, temperature, cap and inference threshold.
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

    def draw(self, logits: Tensor, graph: PackedGraph, step: int) -> FactSelection:
        """Draws a random subgraph per graph from logits, float32 [E]."""
        return gumbel_topk(
            logits,
            graph.fact_ptr,
            self.config.k_facts,
            temperature=self.config.temperature,
            seed=self._step_seed(step, logits.device),
            question_key=graph.question_key,
            mode=self.config.mode,
            estimator=self.config.estimator,
            max_facts=graph.max_facts,
        )

    def best(self, logits: Tensor, graph: PackedGraph) -> FactSelection:
        """Selects the `k_facts` most probable facts above the threshold, at least one per graph."""
        return top_facts(
            logits,
            graph.fact_ptr,
            self.config.k_facts,
            threshold=self.config.prob_threshold,
            max_facts=graph.max_facts,
        )
