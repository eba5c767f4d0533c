"""Triton part of fact_loss that walks a question once: cross entropy, and facts split by label."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import SPLIT_TILES, Budget, KernelSpec, split_tile

# Left alone, the assembler spills to fit one more program.
MAX_REGISTERS = 96


@triton.jit
def log1p_block(e):
    """log(1 + e) for 0 <= e <= 1 as 2 atanh(z), z = e / (2 + e) <= 1/3: no small e is lost."""
    z = e / (2.0 + e)
    s = z * z
    series = tl.fma(s, 0.06666667, 0.07692308)  # 1/15, 1/13
    series = tl.fma(s, series, 0.09090909)
    series = tl.fma(s, series, 0.11111111)
    series = tl.fma(s, series, 0.14285715)
    series = tl.fma(s, series, 0.2)
    series = tl.fma(s, series, 0.33333334)
    return 2.0 * tl.fma(z * s, series, z)


@triton.jit
def cross_entropy(x, positive):
    """softplus(x) - y x and its derivative sigmoid(x) - y, exact where the fact is certain."""
    wrong = tl.where(positive, -x, x)
    e = tl.exp(-tl.abs(wrong))
    slope = tl.where(wrong >= 0.0, 1.0, e) / (1.0 + e)
    # A maximum need not keep NaN; this sum does.
    bce = tl.where(wrong > 0.0, wrong, 0.0) + log1p_block(e)
    return bce, tl.where(positive, -slope, slope)


@triton.jit(do_not_specialize=["num_questions", "num_facts"])
def _fact_loss_fwd_split_kernel(
    logits_ptr,
    label_ptr,
    fact_ptr,
    split_logit_ptr,
    split_fact_ptr,
    positives_ptr,
    bce_ptr,
    gradient_ptr,
    num_questions,
    num_facts,
    BLOCK: tl.constexpr,
):
    """Positives to the front in order, negatives to the back in reverse; P_q, sum of the BCE.

    One program per question, and one that zeroes the gradient after the last question.
    """
    pid_q = tl.program_id(0)
    live = pid_q < num_questions
    begin = tl.load(fact_ptr + pid_q)
    end = tl.load(fact_ptr + pid_q + 1, mask=live, other=0)
    end = tl.where(live, end, begin)
    front, back = begin, end - 1
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        offs_e = start + lane
        mask_e = offs_e < end
        x = tl.load(logits_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
        y = tl.load(label_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
        positive = y > 0.5
        bce, _ = cross_entropy(x, positive)
        total += tl.where(mask_e, bce, 0.0)
        before = tl.cumsum(positive.to(tl.int32), 0)
        # The i-th fact has i + 1 - before negatives up to itself.
        place = tl.where(positive, front + before - 1, back - lane + before)
        tl.store(split_logit_ptr + place, x, mask=mask_e)
        tl.store(split_fact_ptr + place, offs_e, mask=mask_e)
        found = tl.sum(positive.to(tl.int32), 0)
        front += found
        back -= BLOCK - found
    tl.store(positives_ptr + pid_q, front - begin, mask=live)
    tl.store(bce_ptr + pid_q, tl.sum(total, 0), mask=live)
    for start in range(end, tl.where(live, end, num_facts), BLOCK):
        offs_e = start + lane
        tl.store(gradient_ptr + offs_e, tl.zeros((BLOCK,), tl.float32), mask=offs_e < num_facts)


def fact_loss_fwd_split(
    logits: Tensor, label: Tensor, fact_ptr: Tensor, gradient: Tensor, max_facts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split logits and their facts [E], positives and sum of the BCE [B]; zeroes the padding of
    `gradient`."""
    num_questions, num_facts = fact_ptr.shape[0] - 1, logits.shape[0]
    split_logit, split_fact = gradient.new_empty(num_facts), fact_ptr.new_empty(num_facts)
    positives, bce = fact_ptr.new_empty(num_questions), gradient.new_empty(num_questions)
    tile = split_tile(max_facts)
    _fact_loss_fwd_split_kernel[(num_questions + 1,)](
        logits,
        label,
        fact_ptr,
        split_logit,
        split_fact,
        positives,
        bce,
        gradient,
        num_questions,
        num_facts,
        BLOCK=tile.block,
        num_warps=tile.num_warps,
        maxnreg=MAX_REGISTERS,
    )
    return split_logit, split_fact, positives, bce


KERNELS = tuple(
    KernelSpec(
        _fact_loss_fwd_split_kernel,
        types={
            "logits_ptr": logits,
            "label_ptr": "*fp32",
            "fact_ptr": "*i32",
            "split_logit_ptr": "*fp32",
            "split_fact_ptr": "*i32",
            "positives_ptr": "*i32",
            "bce_ptr": "*fp32",
            "gradient_ptr": "*fp32",
            "num_questions": "i32",
            "num_facts": "i32",
        },
        constants={"BLOCK": tile.block},
        num_warps=tile.num_warps,
        budget=Budget(registers=MAX_REGISTERS, shared=512),
        max_registers=MAX_REGISTERS,
    )
    for tile in SPLIT_TILES
    for logits in ("*bf16", "*fp32")
)
