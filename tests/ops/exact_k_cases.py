"""The threshold of exact_k, solved without the op."""

from __future__ import annotations

import math


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
