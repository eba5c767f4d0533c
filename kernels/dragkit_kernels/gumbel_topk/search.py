"""Counts and sums over a question, for its two bisections."""

from __future__ import annotations

import triton
import triton.language as tl

from .facts import CERTAIN, load_codes, load_relaxed

# Halvings of the bracket -2 CERTAIN .. 2 CERTAIN of nu: below float32 resolution.
BISECTIONS = tl.constexpr(42)


@triton.jit
def count_above(
    code,
    bound,
    logits_ptr,
    noise_ptr,
    first,
    size,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    STREAM: tl.constexpr,
):
    """#{e: code_e > bound}: the block at hand and, if streaming, the facts behind it."""
    count = tl.sum((code > bound).to(tl.int32), 0)
    if STREAM:
        for start in range(BLOCK, size, STEP):
            offs_s = start + tl.arange(0, STEP)
            more = load_codes(logits_ptr, noise_ptr, first, size, offs_s)
            count += tl.sum((more > bound).to(tl.int32), 0)
    return count


@triton.jit
def budget_threshold(
    x,
    k,
    logits_ptr,
    noise_ptr,
    first,
    size,
    temperature,
    concrete,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    STREAM: tl.constexpr,
):
    """nu with sum_e sigmoid(x_e - nu) = k by bisection; without a choice -inf, for k = 0 inf."""
    low = tl.full((), -2.0 * CERTAIN, tl.float32)
    high = tl.full((), 2.0 * CERTAIN, tl.float32)
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        total = tl.sum(tl.sigmoid(x - middle), 0)
        if STREAM:
            for start in range(BLOCK, size, STEP):
                offs_s = start + tl.arange(0, STEP)
                more = load_relaxed(
                    logits_ptr, noise_ptr, first, size, offs_s, temperature, concrete
                )
                total += tl.sum(tl.sigmoid(more - middle), 0)
        over = total > k
        low, high = tl.where(over, middle, low), tl.where(over, high, middle)
    nu = tl.where(size <= k, float("-inf"), 0.5 * (low + high))
    return tl.where(k == 0, float("inf"), nu)
