"""Gates and gradients of drawn facts, against independent ones."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from dragkit.retriever.retriever import RetrieverOutput
from dragkit.selftest.numbers.small_joint import SmallJoint, invented_rows
from dragkit.selftest.outcome import Outcome, require
from dragkit_kernels import gumbel_topk

_TOLERANCE = 1e-6
# Makes every fact unlikely: its probability is about 1e-13.
_SHIFT = 30.0


def draw_gradients(outcome: Outcome, *, count: int) -> None:
    """Compares the gradient of a drawn fact's gate with that of its soft gate, in float64.

    Args:
        outcome: counts the cases.
        count: number of random draws, half of them with a fixed number of facts.
    """
    generator = torch.Generator().manual_seed(3)
    for number in range(count):
        exact_k = number % 2 == 1
        size = int(torch.randint(2, 40, (), generator=generator))
        k = int(torch.randint(1, size, (), generator=generator))
        logits, noise, weight = 3 * torch.randn(3, size, dtype=torch.float64, generator=generator)
        logits.requires_grad_()
        with outcome.case(f"draw {number}"):
            drawn = gumbel_topk(
                logits,
                torch.tensor([0, size], dtype=torch.int32),
                k,
                temperature=1.0,
                noise=noise,
                mode="exact_k" if exact_k else "bernoulli",
                estimator="straight_through",
                max_facts=size,
            )
            index = drawn.index[0][drawn.index[0] >= 0].long()
            gate = drawn.gate[0, : len(index)]
            require(bool((gate == 1).all()), "the gate of a drawn fact is not 1")
            (actual,) = torch.autograd.grad((gate * weight[index]).sum(), logits)
            wanted = torch.zeros_like(weight).index_copy(0, index, weight[index])
            expected = _soft_gradient(logits.detach(), wanted, k if exact_k else None)
            error = float((actual - expected).norm() / expected.norm().clamp(min=1e-300))
            require(error <= _TOLERANCE, f"the gradient differs by {error:.1e}")


def _soft_gradient(logits: Tensor, weight: Tensor, k: int | None) -> Tensor:
    """Gradient of weight . sigmoid(logits - nu), with sum(sigmoid(logits - nu)) = k, or nu = 0."""
    if k is None:
        soft = torch.sigmoid(logits)
        return weight * soft * (1 - soft)
    low, high = logits.min() - 50, logits.max() + 50
    for _ in range(60):
        middle = (low + high) / 2
        above = torch.sigmoid(logits - middle).sum() > k
        low, high = (middle, high) if above else (low, middle)
    soft = torch.sigmoid(logits - low)
    slope = soft * (1 - soft)
    return slope * weight - slope * (slope @ weight) / slope.sum()


def empty_draws(outcome: Outcome, root: Path) -> None:
    """Draws where no fact is likely. One enters the prompt unchanged, and its score still learns.

    Args:
        outcome: counts the questions.
        root: folder of the questions.
    """
    toy = SmallJoint(root, invented_rows(root, 8), **{"sampler.mode": "bernoulli"})
    step, relations, batch = toy.phase.step, toy.dataset.relations, toy.batch(range(8))
    retrieve = step.retrieve

    def unlikely(*args: object) -> RetrieverOutput:
        output = retrieve(*args)
        return output._replace(fact_logits=output.fact_logits - _SHIFT)

    with mock.patch.object(step, "retrieve", unlikely):
        draft = step.draw_and_prompt(batch, relations, 0)
        tokens = float(batch.target.ids.numel())
        step.generator_backward(draft, tokens)
        vectors, slots = draft.vectors.flatten(0, -2), draft.slots
        gradient = torch.autograd.grad(slots, draft.logits, draft.leaf.grad)[0]
    selection, width = draft.selection, draft.selection.index.shape[-1]
    for row in range(8):
        with outcome.case(f"question {row}"):
            require(int(selection.count[0, row]) == 1, "not one fact was drawn")
            slot = row * width
            require(torch.equal(slots[slot], vectors[slot]), "the gate changes the fact's vector")
            require(bool(vectors[slot].any()), "the fact's vector is zero")
            fact = int(selection.index[0, row, 0])
            require(bool(gradient[fact] != 0), "its score has no gradient")
