"""Triton forward of gumbel_topk: one program chooses for a question, a second launch sorts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import TOPK_STEP, TOPK_TILES, Budget, KernelSpec, topk_tile
from ..noise_kernel import logistic_noise_fwd
from ..triton_math import order_code
from .facts import (
    DRAWN,
    GIVEN,
    LOWEST,
    NO_NOISE,
    load_codes,
    load_logits,
    load_relaxed,
    masked_code,
    question_bounds,
    relaxed_argument,
)
from .rank import gumbel_topk_fwd_rank
from .search import budget_threshold, count_above

HIGHEST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _store_relaxed(soft_ptr, slot_ptr, x, nu, first, offs_e, size):
    """soft_e = sigmoid(x_e - nu), and no slot yet."""
    tl.store(soft_ptr + first + offs_e, tl.sigmoid(x - nu), mask=offs_e < size)
    tl.store(slot_ptr + first + offs_e, -1, mask=offs_e < size)


@triton.jit
def _store_kept(kept_fact_ptr, kept_code_ptr, code, kth, room, kept, first, offs_e, size):
    """Appends the facts above kth, and the first `room` of those equal to it, in order of facts."""
    tie = (code == kth) & (offs_e < size)
    keep = (code > kth) | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= room))
    place = kept + tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(kept_fact_ptr + place, first + offs_e, mask=keep)
    tl.store(kept_code_ptr + place, code, mask=keep)
    return room - tl.sum(tie.to(tl.int32), 0), kept + tl.sum(keep.to(tl.int32), 0)


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
    STEP: tl.constexpr,
    STREAM: tl.constexpr,
):
    """kept = the c largest keys l_e + noise_e, ties by lowest e; soft_e = sigmoid(x_e - nu).

    c = k in a budget, else min(k, #{e: key_e > bound}) but at least 1; never more than there are.
    One program per question, and one that marks the rows after the last question. A program keeps
    BLOCK facts in registers and, if STREAM, walks the rest in steps.
    """
    pid_q = tl.program_id(0)
    live = pid_q < num_questions
    first, size, question_key = question_bounds(
        fact_ptr, question_key_ptr, pid_q, num_questions, num_facts
    )
    offs_e = tl.arange(0, BLOCK)
    mask_e = offs_e < size
    logit, key = load_logits(logits_ptr, noise_ptr, seed_ptr, question_key, first, offs_e, mask_e)
    code = masked_code(key, mask_e)
    x = relaxed_argument(tl.where(concrete != 0, key, logit), temperature, mask_e)

    nu = tl.full((), 0.0, tl.float32)
    if budget != 0:
        nu = budget_threshold(
            x, k, logits_ptr, noise_ptr, first, size, temperature, concrete, BLOCK, STEP, STREAM
        )
    nu = tl.where(live, nu, float("inf"))
    tl.store(nu_ptr + pid_q, nu)
    _store_relaxed(soft_ptr, slot_ptr, x, nu, first, offs_e, size)
    for start in range(BLOCK, size, STEP):  # also any number of padding rows
        offs_s = start + tl.arange(0, STEP)
        more = load_relaxed(logits_ptr, noise_ptr, first, size, offs_s, temperature, concrete)
        _store_relaxed(soft_ptr, slot_ptr, more, nu, first, offs_s, size)

    bound = order_code(bound)
    fired = count_above(code, bound, logits_ptr, noise_ptr, first, size, BLOCK, STEP, STREAM)
    want = tl.minimum(tl.where(budget != 0, size, tl.maximum(fired, 1)), tl.minimum(size, k))
    want = tl.where(live, want, 0)
    tl.store(count_ptr + pid_q, want, mask=live)
    # The want-th largest code, the smallest t with #{code > t} < want, bit by bit from the top.
    kth = tl.full((), HIGHEST, tl.int32)
    bit = tl.full((), LOWEST, tl.int32).to(tl.uint32, bitcast=True)
    for _ in range(32):
        lower = kth ^ bit.to(tl.int32, bitcast=True)
        count = count_above(code, lower, logits_ptr, noise_ptr, first, size, BLOCK, STEP, STREAM)
        kth = tl.where(count < want, lower, kth)
        bit = bit >> 1

    above = count_above(code, kth, logits_ptr, noise_ptr, first, size, BLOCK, STEP, STREAM)
    room, kept = _store_kept(
        kept_fact_ptr,
        kept_code_ptr,
        code,
        kth,
        want - above,
        pid_q.to(tl.int64) * k,
        first,
        offs_e,
        size,
    )
    if STREAM:
        for start in range(BLOCK, size, STEP):
            offs_s = start + tl.arange(0, STEP)
            more = load_codes(logits_ptr, noise_ptr, first, size, offs_s)
            room, kept = _store_kept(
                kept_fact_ptr, kept_code_ptr, more, kth, room, kept, first, offs_s, size
            )


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
        STEP=min(tile.block, TOPK_STEP),
        STREAM=stream,
        num_warps=tile.num_warps,
    )
    gumbel_topk_fwd_rank(kept_fact, kept_code, count, index, gate, slot)
    return gate, soft, nu, index, count, slot


_TYPES = {
    "logits_ptr": "*fp32",
    "fact_ptr": "*i32",
    "kept_fact_ptr": "*i32",
    "kept_code_ptr": "*i32",
    "count_ptr": "*i32",
    "soft_ptr": "*fp32",
    "slot_ptr": "*i32",
    "nu_ptr": "*fp32",
    "num_facts": "i32",
    "num_questions": "i32",
    "k": "i32",
    "bound": "fp32",
    "temperature": "fp32",
    "budget": "i32",
    "concrete": "i32",
}
KERNELS = tuple(
    KernelSpec(
        _gumbel_topk_fwd_kernel,
        types={**_TYPES, **noise},
        constants={"BLOCK": tile.block, "STEP": min(tile.block, TOPK_STEP), "STREAM": stream},
        num_warps=tile.num_warps,
        budget=Budget(registers=128, shared=2048),
    )
    for tile, stream in (*((tile, False) for tile in TOPK_TILES), (TOPK_TILES[-1], True))
    for noise in ((GIVEN, NO_NOISE) if stream else (DRAWN, GIVEN, NO_NOISE))
)
