"""Triton forward of gumbel_topk: one program chooses for a question, a second launch sorts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import RANK_STEP, RANK_TILE, TOPK_TILES, Budget, KernelSpec, topk_tile
from ..noise_kernel import logistic_noise_fwd
from ..triton_math import logistic_noise_block, order_code

LOWEST = tl.constexpr(-0x80000000)
HIGHEST = tl.constexpr(0x7FFFFFFF)
CERTAIN = tl.constexpr(1e4)
# Halvings of the bracket -2 CERTAIN .. 2 CERTAIN of nu: below float32 resolution.
BISECTIONS = tl.constexpr(42)


@triton.jit
def question_bounds(fact_ptr, question_key_ptr, pid_q, num_questions, num_facts):
    """(first fact, facts, key) of a question; the one after the last owns the padding rows."""
    live = pid_q < num_questions
    first = tl.load(fact_ptr + pid_q)
    end = tl.load(fact_ptr + pid_q + 1, mask=live, other=num_facts)
    question_key = tl.full((), 0, tl.int64)
    if question_key_ptr is not None:
        question_key = tl.load(question_key_ptr + pid_q, mask=live, other=0)
    return first, end - first, question_key


@triton.jit
def load_logits(logits_ptr, noise_ptr, seed_ptr, question_key, first, offs_e, mask_e):
    """(l, l + noise) in float32: the noise is given, or drawn from the seed, or there is none."""
    logit = tl.load(logits_ptr + first + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    key = logit
    if noise_ptr is not None:
        key += tl.load(noise_ptr + first + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        key += logistic_noise_block(tl.load(seed_ptr), question_key, offs_e)
    return logit, key


@triton.jit
def relaxed_argument(x, temperature, mask_e):
    """x / T, certain beyond +-CERTAIN so that no infinity meets nu; -inf outside the question."""
    x = tl.clamp(x / temperature, -CERTAIN, CERTAIN, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(mask_e, x, float("-inf"))


@triton.jit
def _codes(logits_ptr, noise_ptr, first, size, start, BLOCK: tl.constexpr):
    """Order codes of the keys of the facts start .. start + BLOCK; LOWEST after the last."""
    offs_e = start + tl.arange(0, BLOCK)
    mask_e = offs_e < size
    _, key = load_logits(logits_ptr, noise_ptr, None, 0, first, offs_e, mask_e)
    return tl.where(mask_e, order_code(key), LOWEST)


@triton.jit
def _count_above(
    code, bound, logits_ptr, noise_ptr, first, size, BLOCK: tl.constexpr, STREAM: tl.constexpr
):
    """#{e: code_e > bound}: the block at hand and, when streaming, those behind it."""
    count = tl.sum((code > bound).to(tl.int32), 0)
    if STREAM:
        for start in range(BLOCK, size, BLOCK):
            more = _codes(logits_ptr, noise_ptr, first, size, start, BLOCK)
            count += tl.sum((more > bound).to(tl.int32), 0)
    return count


@triton.jit
def _kth_code(
    code, want, logits_ptr, noise_ptr, first, size, BLOCK: tl.constexpr, STREAM: tl.constexpr
):
    """The smallest t with #{e: code_e > t} < want, bit by bit: the want-th largest code."""
    kth = tl.full((), HIGHEST, tl.int32)
    bit = tl.full((), LOWEST, tl.int32).to(tl.uint32, bitcast=True)
    for _ in range(32):
        lower = kth ^ bit.to(tl.int32, bitcast=True)
        count = _count_above(code, lower, logits_ptr, noise_ptr, first, size, BLOCK, STREAM)
        kth = tl.where(count < want, lower, kth)
        bit = bit >> 1
    return kth


@triton.jit
def _budget_threshold(
    x,
    k,
    logits_ptr,
    noise_ptr,
    first,
    size,
    temperature,
    concrete,
    BLOCK: tl.constexpr,
    STREAM: tl.constexpr,
):
    """nu with sum_e sigmoid(x_e - nu) = k by bisection; without a choice -inf, for k = 0 inf."""
    low = tl.full((), -2.0 * CERTAIN, tl.float32)
    high = tl.full((), 2.0 * CERTAIN, tl.float32)
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        total = tl.sum(tl.sigmoid(x - middle), 0)
        if STREAM:
            for start in range(BLOCK, size, BLOCK):
                offs_e = start + tl.arange(0, BLOCK)
                mask_e = offs_e < size
                logit, key = load_logits(logits_ptr, noise_ptr, None, 0, first, offs_e, mask_e)
                more = tl.where(concrete != 0, key, logit)
                more = relaxed_argument(more, temperature, mask_e)
                total += tl.sum(tl.sigmoid(more - middle), 0)
        over = total > k
        low, high = tl.where(over, middle, low), tl.where(over, high, middle)
    nu = tl.where(size <= k, float("-inf"), 0.5 * (low + high))
    return tl.where(k == 0, float("inf"), nu)


@triton.jit(do_not_specialize=["num_facts", "num_questions", "k", "budget", "concrete"])
def _gumbel_topk_fwd_kernel(
    logits_ptr,
    noise_ptr,
    seed_ptr,
    question_key_ptr,
    fact_ptr,
    kept_fact_ptr,
    kept_code_ptr,
    count_ptr,
    soft_ptr,
    slot_ptr,
    nu_ptr,
    num_facts,
    num_questions,
    k,
    bound,
    temperature,
    budget,
    concrete,
    BLOCK: tl.constexpr,
    STREAM: tl.constexpr,
):
    """kept = the c largest keys l_e + noise_e, ties by lowest e; soft_e = sigmoid(x_e - nu).

    c = k in a budget, else min(k, #{e: key_e > bound}) but at least 1; never more than there are.
    One program per question, and one that marks the rows after the last question.
    """
    pid_q = tl.program_id(0)
    live = pid_q < num_questions
    first, size, question_key = question_bounds(
        fact_ptr, question_key_ptr, pid_q, num_questions, num_facts
    )
    offs_e = tl.arange(0, BLOCK)
    logit, key = load_logits(
        logits_ptr, noise_ptr, seed_ptr, question_key, first, offs_e, offs_e < size
    )
    code = tl.where(offs_e < size, order_code(key), LOWEST)
    x = relaxed_argument(tl.where(concrete != 0, key, logit), temperature, offs_e < size)

    fired = _count_above(code, order_code(bound), logits_ptr, noise_ptr, first, size, BLOCK, STREAM)
    want = tl.minimum(tl.where(budget != 0, size, tl.maximum(fired, 1)), tl.minimum(size, k))
    want = tl.where(live, want, 0)
    kth = _kth_code(code, want, logits_ptr, noise_ptr, first, size, BLOCK, STREAM)
    above = _count_above(code, kth, logits_ptr, noise_ptr, first, size, BLOCK, STREAM)
    nu = tl.full((), 0.0, tl.float32)
    if budget != 0:
        nu = _budget_threshold(
            x, k, logits_ptr, noise_ptr, first, size, temperature, concrete, BLOCK, STREAM
        )
    nu = tl.where(live, nu, float("inf"))
    tl.store(nu_ptr + pid_q, nu)
    tl.store(count_ptr + pid_q, want, mask=live)

    room = want - above  # places for facts equal to the last one kept
    kept = pid_q.to(tl.int64) * k
    for start in range(0, size, BLOCK):
        offs_e = start + tl.arange(0, BLOCK)
        mask_e = offs_e < size
        logit, key = load_logits(
            logits_ptr, noise_ptr, seed_ptr, question_key, first, offs_e, mask_e
        )
        code = order_code(key)
        tie = (code == kth) & mask_e
        keep = ((code > kth) & mask_e) | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= room))
        place = kept + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(kept_fact_ptr + place, first + offs_e, mask=keep)
        tl.store(kept_code_ptr + place, code, mask=keep)
        room -= tl.sum(tie.to(tl.int32), 0)
        kept += tl.sum(keep.to(tl.int32), 0)
        x = relaxed_argument(tl.where(concrete != 0, key, logit), temperature, mask_e)
        tl.store(soft_ptr + first + offs_e, tl.sigmoid(x - nu), mask=mask_e)
        tl.store(slot_ptr + first + offs_e, -1, mask=mask_e)


@triton.jit(do_not_specialize=["k"])
def _gumbel_topk_fwd_rank_kernel(
    kept_fact_ptr,
    kept_code_ptr,
    count_ptr,
    index_ptr,
    gate_ptr,
    slot_ptr,
    k,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """index[q, r_i] = kept_i, slot[kept_i] = r_i; r_i = #{j: code_j > code_i, or equal and j < i}."""
    pid_q = tl.program_id(0)
    row = pid_q.to(tl.int64) * k
    count = tl.load(count_ptr + pid_q)
    offs_i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_i = offs_i < count
    code_i = tl.load(kept_code_ptr + row + offs_i, mask=mask_i, other=0)[:, None]
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, STEP):
        offs_j = start + tl.arange(0, STEP)
        mask_j = offs_j < count
        code_j = tl.load(kept_code_ptr + row + offs_j, mask=mask_j, other=0)[None, :]
        earlier = (code_j == code_i) & (offs_j[None, :] < offs_i[:, None])
        better = ((code_j > code_i) | earlier) & mask_j[None, :]
        rank += tl.sum(better.to(tl.int32), 1)
    fact = tl.load(kept_fact_ptr + row + offs_i, mask=mask_i, other=0)
    tl.store(index_ptr + row + rank, fact, mask=mask_i)
    tl.store(slot_ptr + fact, rank, mask=mask_i)
    mask_k = offs_i < k
    tl.store(index_ptr + row + offs_i, -1, mask=mask_k & (offs_i >= count))
    tl.store(gate_ptr + row + offs_i, mask_i.to(tl.float32), mask=mask_k)


def gumbel_topk_fwd(
    logits: Tensor,
    fact_ptr: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    question_key: Tensor | None,
    k: int,
    max_facts: int,
    bound: float,
    temperature: float,
    budget: bool,
    concrete: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches both kernels; see `dragkit::gumbel_topk_fwd`."""
    num_questions, num_facts = fact_ptr.shape[0] - 1, logits.shape[0]
    tile, stream = topk_tile(max_facts)
    if stream and seed is not None:
        # Walked dozens of times: drawn once, where everything else draws it in registers.
        noise, seed = logistic_noise_fwd(seed, question_key, fact_ptr, num_facts), None
    index = fact_ptr.new_empty(num_questions, k)
    gate = logits.new_empty(num_questions, k, dtype=torch.float32)
    count = fact_ptr.new_empty(num_questions)
    soft = logits.new_empty(num_facts, dtype=torch.float32)
    slot = fact_ptr.new_empty(num_facts)
    nu = logits.new_empty(num_questions + 1, dtype=torch.float32)
    kept_fact, kept_code = index.new_empty(index.shape), index.new_empty(index.shape)
    _gumbel_topk_fwd_kernel[(num_questions + 1,)](
        logits.contiguous(),
        None if noise is None else noise.contiguous(),
        seed,
        None if seed is None else question_key.contiguous(),
        fact_ptr.contiguous(),
        kept_fact,
        kept_code,
        count,
        soft,
        slot,
        nu,
        num_facts,
        num_questions,
        k,
        bound,
        temperature if concrete else 1.0,
        int(budget),
        int(concrete),
        BLOCK=tile.block,
        STREAM=stream,
        num_warps=tile.num_warps,
    )
    if index.numel() > 0:
        grid = (num_questions, triton.cdiv(k, RANK_TILE.block))
        _gumbel_topk_fwd_rank_kernel[grid](
            kept_fact,
            kept_code,
            count,
            index,
            gate,
            slot,
            k,
            BLOCK=RANK_TILE.block,
            STEP=RANK_STEP,
            num_warps=RANK_TILE.num_warps,
        )
    return index, gate, count, soft, slot, nu
