"""Which facts enter the prompt: differentiable draws in training, the best ones at inference."""

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
        seed: of the noise; the draw is a function of (seed, step, question, fact) alone.
    """

    def __init__(self, config: SamplerConfig, seed: int) -> None:
        self.config = config
        self.seed = seed

    def _step_seed(self, step: int, device: torch.device) -> Tensor:
        # Low word: step, high word: seed; Philox mixes the two key words.
        word = (self.seed << 32) | (step & 0xFFFFFFFF)
        signed = word - (1 << 64) if word >= 1 << 63 else word
        # Filled in on the device: a copy of a host number would be waited for.
        return torch.full((), signed, dtype=torch.int64, device=device)

    def draw(self, logits: Tensor, graph: PackedGraph, step: int) -> FactSelection:
        """A random subgraph per question; float32 [E] logits."""
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
        """The `k_facts` most probable facts with p above the threshold, at least one."""
        return top_facts(
            logits,
            graph.fact_ptr,
            self.config.k_facts,
            threshold=self.config.prob_threshold,
            max_facts=graph.max_facts,
        )
