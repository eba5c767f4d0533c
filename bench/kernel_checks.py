"""Results and gradients of every contender against float64, before anything is timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.kernel_ways import Contender, Problem
from dragkit.trainer.replay import CudaCapture

# Largest norm of an error over the norm of the truth, of results and of gradients. Peers that sum
# bfloat16 in bfloat16 are let through as long as they are recognisably right.
_OURS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (8e-3, 1.6e-2)}
_PEERS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (5e-2, 2e-1)}
# No gradient comes in where the truth before the last ReLU is this near to zero, of its RMS.
_KINK = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
# Least norm that a gradient's error is divided by, as a part of the largest gradient's norm.
_FLOOR = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
# And any error.
_NOTHING = 1e-12

Step = Callable[[], list[Tensor]]


class Truth(NamedTuple):
    """What contenders have to find.

    Attributes:
        grad: what comes into the backward; results, gradients: in float64, integers as they are.
    """

    grad: Tensor
    results: list[Tensor]
    gradients: list[Tensor]


def find_truth(problem: Problem, *, backward: bool) -> Truth:
    """The results in float64, and the gradients if they are asked for."""
    leaves = [leaf.detach().double().requires_grad_(backward) for leaf in problem.leaves]
    first, *others = problem.truth(*leaves)
    generator = torch.Generator().manual_seed(11)
    grad = torch.randn(first.shape, generator=generator).to(problem.dtype).to(first.device)
    if problem.kink:
        near = first.detach().abs() < _KINK[problem.dtype] * first.detach().square().mean().sqrt()
        grad, first = grad.masked_fill(near, 0.0), first.relu()
    gradients = list(torch.autograd.grad(first, leaves, grad.double())) if backward else []
    return Truth(grad, [first.detach(), *others], gradients)


def make_step(problem: Problem, contender: Contender, truth: Truth, *, backward: bool) -> Step:
    """What is timed: the forward alone, or with the gradients of all leaves."""
    leaves = list(problem.leaves)

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return list(contender.run())

    def both() -> list[Tensor]:
        first, *others = contender.run()
        grad = truth.grad if first.dtype == truth.grad.dtype else truth.grad.to(first.dtype)
        found = torch.autograd.grad(first, leaves, grad)
        return [first.detach(), *others, *found]

    step = both if backward else forward
    if not contender.replay:
        return step
    results: list[Tensor] = []

    def work() -> None:
        results[:] = step()

    replay = CudaCapture(truth.grad.device)(work)

    def again() -> list[Tensor]:
        replay()
        return results

    return again


def _error(found: Tensor, expected: Tensor, floor: float) -> float:
    """Norm of the difference over that of the expected; infinity for other shapes and for NaN.

    Args:
        floor: least norm to divide by.
    """
    if found.shape != expected.shape:
        return math.inf
    expected = expected.double()
    error = float((found.double() - expected).norm()) / max(float(expected.norm()), floor)
    return error if math.isfinite(error) else math.inf


def tolerances(problem: Problem, contender: Contender) -> tuple[float, float]:
    """Of results and of gradients."""
    limits = [problem.tolerance or _OURS[problem.dtype]]
    if contender.peer:
        limits.append(_PEERS[problem.dtype])
    value, slope = (max(pair) for pair in zip(*limits, strict=True))
    return value, slope


def agreement(problem: Problem, contender: Contender, truth: Truth, step: Step) -> float:
    """The largest error of a contender.

    Raises:
        ValueError: an error exceeds its tolerance.
    """
    found = step()
    value, slope = tolerances(problem, contender)
    expected = [*truth.results, *truth.gradients]
    limits = [value] * len(truth.results) + [slope] * len(truth.gradients)
    # A gradient whose terms nearly cancel, as that of a softmax's scores, is judged by its size
    # beside the others.
    floor = _FLOOR[problem.dtype] * max(
        (float(gradient.norm()) for gradient in truth.gradients), default=0.0
    )
    floors = [_NOTHING] * len(truth.results) + [max(floor, _NOTHING)] * len(truth.gradients)
    largest = 0.0
    for place, (got, want, limit, least) in enumerate(
        zip(found, expected, limits, floors, strict=True)
    ):
        error = _error(got, want, least)
        if not error <= limit:
            what = f"result {place}"
            if place >= len(truth.results):
                what = f"gradient {place - len(truth.results)}"
            raise ValueError(f"{what} differs from float64 by {error:.1e}, {limit:.0e} is allowed")
        largest = max(largest, error)
    return largest
