"""Triton forward of fact_loss: all pairs of a question's split facts, and the sums over them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import (
    PAIR_PROGRAMS,
    PAIR_STEP,
    PAIR_TILE,
    Budget,
    KernelSpec,
    pair_programs,
)
from .loss_split import cross_entropy, fact_loss_fwd_split


@triton.jit
def _violations(
    x, other_ptr, begin, end, margin, NEGATIVE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Of every x among the others: how many pairs have l_neg + m > l_pos, and by how much.

    NEGATIVE says that x are the negatives. Both kinds round a pair alike, so that their counts
    agree, and only the difference of the logits, so that a common offset costs no precision.
    """
    count = tl.zeros((ROWS, COLS), tl.int32)
    hinge = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(begin, end, COLS):
        offs = start + tl.arange(0, COLS)
        # Where there is no partner the excess is -inf, or NaN, which is not above zero either.
        if NEGATIVE:
            other = tl.load(other_ptr + offs, mask=offs < end, other=float("inf"))
            excess = margin + (x[:, None] - other[None, :])
            hinge += tl.where(excess > 0.0, excess, 0.0)
        else:
            other = tl.load(other_ptr + offs, mask=offs < end, other=float("-inf"))
            excess = margin + (other[None, :] - x[:, None])
        count += (excess > 0.0).to(tl.int32)
    return tl.sum(count, 1).to(tl.float32), tl.sum(hinge, 1)


@triton.jit(do_not_specialize=["num_blocks"])
def _fact_loss_fwd_kernel(
    fact_ptr,
    split_logit_ptr,
    split_fact_ptr,
    positives_ptr,
    bce_ptr,
    gradient_ptr,
    hinge_ptr,
    bce_weight,
    rank_weight,
    margin,
    num_blocks,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """gradient_e = w_bce / n (sigmoid(l) - y) +- w_rank / (P N) #violations; this program's hinges.

    A program takes every num_blocks-th block of a question's split facts.
    """
    pid = tl.program_id(0)
    pid_q = pid // num_blocks
    begin = tl.load(fact_ptr + pid_q)
    end = tl.load(fact_ptr + pid_q + 1)
    positives = tl.load(positives_ptr + pid_q)
    middle = begin + positives
    facts = (end - begin).to(tl.float32)
    pairs = positives.to(tl.float32) * (end - middle).to(tl.float32)
    bce_sum = tl.load(bce_ptr + pid_q)
    # NaN at one fact is NaN at all facts of its question.
    per_fact = tl.where(bce_sum == bce_sum, bce_weight / facts, float("nan"))
    per_pair = rank_weight / tl.maximum(pairs, 1.0)
    total = tl.zeros((ROWS,), tl.float32)
    first = begin + (pid - pid_q * num_blocks) * ROWS
    for start in range(first, end, num_blocks * ROWS):
        offs = start + tl.arange(0, ROWS)
        mask = offs < end
        positive = offs < middle
        x = tl.load(split_logit_ptr + offs, mask=mask, other=0.0)
        # A block of one kind has nothing to compare with its own.
        to_middle = tl.where(start + ROWS > middle, middle, begin)
        from_middle = tl.where(start < middle, middle, end)
        above, hinge = _violations(x, split_logit_ptr, begin, to_middle, margin, True, ROWS, COLS)
        below, _ = _violations(x, split_logit_ptr, from_middle, end, margin, False, ROWS, COLS)
        total += tl.where(mask & (offs >= middle), hinge, 0.0)
        fact = tl.load(split_fact_ptr + offs, mask=mask, other=0)
        _, slope = cross_entropy(x, positive)
        count = tl.where(positive, -below, above)
        gradient = tl.fma(per_fact, slope, per_pair * count)
        tl.store(gradient_ptr + fact, tl.where(positives > 0, gradient, 0.0), mask=mask)
    tl.store(hinge_ptr + pid, tl.sum(total, 0))


@triton.jit
def _weighted(value, weight):
    """weight * value, where no weight makes nothing even of infinity."""
    return tl.where((weight == 0.0) & (tl.abs(value) == float("inf")), 0.0, weight * value)


@triton.jit(do_not_specialize=["num_blocks"])
def _fact_loss_fwd_sum_kernel(
    fact_ptr,
    positives_ptr,
    bce_ptr,
    hinge_ptr,
    loss_ptr,
    bce_weight,
    rank_weight,
    num_blocks,
    BLOCK: tl.constexpr,
):
    """loss_q = w_bce BCE / n + w_rank hinges / (P N), 0 without positives."""
    pid_q = tl.program_id(0)
    facts = tl.load(fact_ptr + pid_q + 1) - tl.load(fact_ptr + pid_q)
    positives = tl.load(positives_ptr + pid_q)
    pairs = positives.to(tl.float32) * (facts - positives).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    row = pid_q.to(tl.int64) * num_blocks
    hinge = tl.sum(tl.load(hinge_ptr + row + lane, mask=lane < num_blocks, other=0.0), 0)
    bce = tl.load(bce_ptr + pid_q) / tl.maximum(facts, 1).to(tl.float32)
    rank = hinge / tl.maximum(pairs, 1.0)
    loss = _weighted(bce, bce_weight) + _weighted(rank, rank_weight)
    tl.store(loss_ptr + pid_q, tl.where(positives > 0, loss, 0.0))


def fact_loss_fwd(
    logits: Tensor, label: Tensor, fact_ptr: Tensor, rho: float, margin: float, max_facts: int
) -> tuple[Tensor, Tensor]:
    """Launches the three kernels; see `dragkit::fact_loss_fwd`."""
    num_questions, num_facts = fact_ptr.shape[0] - 1, logits.shape[0]
    loss = logits.new_empty(num_questions, dtype=torch.float32)
    gradient = logits.new_empty(num_facts, dtype=torch.float32)
    fact_ptr = fact_ptr.contiguous()
    split = fact_loss_fwd_split(
        logits.contiguous(), label.contiguous(), fact_ptr, gradient, max_facts
    )
    if num_questions == 0:
        return loss, gradient
    num_blocks = pair_programs(max_facts)
    hinge = loss.new_empty(num_questions * num_blocks)
    if num_blocks > 0:
        _fact_loss_fwd_kernel[(num_questions * num_blocks,)](
            fact_ptr,
            *split,
            gradient,
            hinge,
            rho,
            1 - rho,
            margin,
            num_blocks,
            ROWS=PAIR_TILE.block,
            COLS=PAIR_STEP,
            num_warps=PAIR_TILE.num_warps,
        )
    _fact_loss_fwd_sum_kernel[(num_questions,)](
        fact_ptr,
        *split[2:],
        hinge,
        loss,
        rho,
        1 - rho,
        num_blocks,
        BLOCK=PAIR_PROGRAMS,
        num_warps=PAIR_TILE.num_warps,
    )
    return loss, gradient


_TYPES = {
    "fact_ptr": "*i32",
    "split_logit_ptr": "*fp32",
    "split_fact_ptr": "*i32",
    "positives_ptr": "*i32",
    "bce_ptr": "*fp32",
    "gradient_ptr": "*fp32",
}
_WEIGHTS = {"bce_weight": "fp32", "rank_weight": "fp32", "num_blocks": "i32"}
KERNELS = (
    KernelSpec(
        _fact_loss_fwd_kernel,
        types={**_TYPES, "hinge_ptr": "*fp32", **_WEIGHTS, "margin": "fp32"},
        constants={"ROWS": PAIR_TILE.block, "COLS": PAIR_STEP},
        num_warps=PAIR_TILE.num_warps,
        budget=Budget(registers=96, shared=512),
    ),
    KernelSpec(
        _fact_loss_fwd_sum_kernel,
        types={
            **{name: _TYPES[name] for name in ("fact_ptr", "positives_ptr", "bce_ptr")},
            "hinge_ptr": "*fp32",
            "loss_ptr": "*fp32",
            **_WEIGHTS,
        },
        constants={"BLOCK": PAIR_PROGRAMS},
        num_warps=PAIR_TILE.num_warps,
        budget=Budget(registers=64, shared=64),
    ),
)
