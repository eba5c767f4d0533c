"""Selects facts for the prompt: differentiable draws in training, the best facts at inference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dragkit.config import SamplerConfig
from dragkit.data.packed import PackedGraph
from dragkit_kernels import FactSelection, draw_score, gumbel_topk, logistic_noise, top_facts

# Fewer would not be told from 0 in half precision.
_MIN_GATE = 1e-6


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

    def draw(
        self, logits: Tensor, graph: PackedGraph, step: int
    ) -> tuple[FactSelection, Tensor | None]:
        """Draws M = `num_draws` random subgraphs per graph.

        With "soft_gates" these are the k facts with the largest keys, key = logit + noise. Their
        gates are sigmoid(key / temperature). The other estimators draw facts with gates of 1.

        Args:
            logits: float32 [E].
            graph: the pack.
            step: index of the optimizer step.

        Returns:
            The facts of the draws, whose fields begin with the dimension M, and with
            "leave_one_out" their score function, float32 [M, E], see `draw_score`.
        """
        config, estimator = self.config, self.config.estimator
        noise = logistic_noise(
            self._step_seed(step, logits.device),
            graph.question_key,
            graph.fact_ptr,
            num_facts=graph.num_facts,
            num_draws=config.num_draws,
        )
        has_gates = estimator in ("binary_concrete", "straight_through")
        selection = gumbel_topk(
            logits if has_gates else logits.detach(),
            graph.fact_ptr,
            config.k_facts,
            temperature=config.temperature,
            noise=noise,
            mode="exact_k" if estimator == "soft_gates" else config.mode,
            estimator=estimator if has_gates else "straight_through",
            max_facts=graph.max_facts,
        )
        if estimator == "soft_gates":
            soft = torch.sigmoid((logits + noise) / config.temperature)
            return _with_gates(selection, soft), None
        if estimator == "leave_one_out":
            score = draw_score(logits, noise, graph.fact_ptr, config.k_facts, config.mode)
            return selection, score
        return selection, None

    def best(self, logits: Tensor, graph: PackedGraph) -> FactSelection:
        """Selects the `k_facts` most probable facts above the threshold, at least one per graph."""
        return top_facts(
            logits,
            graph.fact_ptr,
            self.config.k_facts,
            threshold=self.config.prob_threshold,
            max_facts=graph.max_facts,
        )


def _with_gates(selection: FactSelection, soft: Tensor) -> FactSelection:
    """The selection with the gates `soft`, float [M, E]. Its count is that of gates above 1/2."""
    # An empty slot, -1, reads the spare last column.
    fact = selection.index.flatten(1).long().remainder(soft.shape[1] + 1)
    gate = F.pad(soft, (0, 1)).gather(1, fact).view(selection.index.shape)
    # The log of a gate enters the generator.
    gate = gate.clamp(min=_MIN_GATE)
    return selection._replace(gate=gate, soft=soft, count=(gate > 0.5).sum(-1, dtype=torch.int32))
