"""Draws of facts for tests, and the threshold of exact_k, solved without the op."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dragkit_kernels import FactSelection, gumbel_topk

CPU = torch.device("cpu")
# Facts of each question.
SIZES = [0, 7, 1, 0, 12, 3, 0]


def offsets(sizes: list[int], device: torch.device = CPU) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).int().to(device)


def draw(logits: Tensor, sizes: list[int], k: int, **options: object) -> FactSelection:
    options.setdefault("noise", torch.zeros_like(logits))
    return gumbel_topk(logits, offsets(sizes, logits.device), k, **options)


def solve_threshold(x: list[float], k: int) -> float:
    """nu with sum sigmoid(x - nu) = k, by bisection in Python floats."""
    low, high = min(x) - 50.0, max(x) + 50.0
    for _ in range(200):
        nu = (low + high) / 2
        if sum(1 / (1 + math.exp(nu - v)) for v in x) > k:
            low = nu
        else:
            high = nu
    return nu
