"""Triton forward of gumbel_topk: one program selects the facts of a question."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import TOPK_STEP, TOPK_STREAM, TOPK_TILES, ResourceLimits, spec, topk_tile
from ..triton_math import order_code

LOWEST = tl.constexpr(-0x80000000)
HIGHEST = tl.constexpr(0x7FFFFFFF)
MAX_LOGIT = tl.constexpr(1e4)
# Bisections of nu in [-2 MAX_LOGIT, 2 MAX_LOGIT], down to less than float32 resolution.
BISECTIONS = tl.constexpr(42)


@triton.jit
def _load_codes(key_ptr, first, size, offs_e):
    """Sortable codes of the keys, LOWEST outside the question."""
    key = tl.load(key_ptr + first + offs_e, mask=offs_e < size, other=0.0)
    return tl.where(offs_e < size, order_code(key), LOWEST)


@triton.jit
def _load_relaxed(x_ptr, first, size, offs_e):
    """x clamped to +-MAX_LOGIT, so that x - nu is finite, and -inf outside the question."""
    x = tl.load(x_ptr + first + offs_e, mask=offs_e < size, other=0.0)
    x = tl.clamp(x, -MAX_LOGIT, MAX_LOGIT, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(offs_e < size, x, float("-inf"))


@triton.jit
def _count_above(
    code, bound, key_ptr, first, size,
    BLOCK: tl.constexpr, STEP: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """#{e: code_e > bound} in the block and, with STREAM, in the facts after it."""
    count = tl.sum((code > bound).to(tl.int32), 0)
    if STREAM:
        for start in range(BLOCK, size, STEP):
            next_block = _load_codes(key_ptr, first, size, start + tl.arange(0, STEP))
            count += tl.sum((next_block > bound).to(tl.int32), 0)
    return count


@triton.jit
def _exact_k_threshold(
    x, k, x_ptr, first, size, BLOCK: tl.constexpr, STEP: tl.constexpr, STREAM: tl.constexpr
):
    """nu with sum_e sigmoid(x_e - nu) = k, or -inf if size <= k, or inf if k = 0."""
    low = tl.full((), -2.0 * MAX_LOGIT, tl.float32)
    high = tl.full((), 2.0 * MAX_LOGIT, tl.float32)
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        total = tl.sum(tl.sigmoid(x - middle), 0)
        if STREAM:
            for start in range(BLOCK, size, STEP):
                next_block = _load_relaxed(x_ptr, first, size, start + tl.arange(0, STEP))
                total += tl.sum(tl.sigmoid(next_block - middle), 0)
        too_many = total > k
        low, high = tl.where(too_many, middle, low), tl.where(too_many, high, middle)
    nu = tl.where(size <= k, float("-inf"), 0.5 * (low + high))
    return tl.where(k == 0, float("inf"), nu)


@triton.jit
def _store_selected(
    out_fact_ptr, out_code_ptr, code, kth, ties_left, num_stored, first, offs_e, size
):
    """Appends the facts with code > kth, and the first `ties_left` with code == kth, in order."""
    is_tie = (code == kth) & (offs_e < size)
    selected = (code > kth) | (is_tie & (tl.cumsum(is_tie.to(tl.int32), 0) <= ties_left))
    slot = num_stored + tl.cumsum(selected.to(tl.int32), 0) - 1
    tl.store(out_fact_ptr + slot, first + offs_e, mask=selected)
    tl.store(out_code_ptr + slot, code, mask=selected)
    return ties_left - tl.sum(is_tie.to(tl.int32), 0), num_stored + tl.sum(selected.to(tl.int32), 0)


@triton.jit(do_not_specialize=["num_facts", "num_questions", "k", "exact_k"])
def _gumbel_topk_fwd_kernel(
    x_ptr, key_ptr, fact_ptr,
    out_fact_ptr, out_code_ptr, count_ptr, soft_ptr,
    num_facts, num_questions, k, bound, exact_k,
    BLOCK: tl.constexpr, STEP: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Selects the c largest keys, ties by lowest fact, and stores soft = sigmoid(x - nu).

    c = min(size, k) with exact_k, else min(size, k, max(1, #{e: key_e > bound})). The selected
    facts keep their order.
    Programs have two axes: the questions with one more for the padding rows after the last
    question, and the draws. A program keeps BLOCK facts in registers and, with STREAM, loads the
    others in steps of STEP.
    """
    pid_q, draw = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x_ptr += draw * num_facts
    key_ptr += draw * num_facts
    soft_ptr += draw * num_facts
    has_question = pid_q < num_questions
    first = tl.load(fact_ptr + pid_q)
    size = tl.load(fact_ptr + pid_q + 1, mask=has_question, other=num_facts) - first
    offs_e = tl.arange(0, BLOCK)
    x = _load_relaxed(x_ptr, first, size, offs_e)
    nu = tl.full((), 0.0, tl.float32)
    if exact_k != 0:
        nu = _exact_k_threshold(x, k, x_ptr, first, size, BLOCK, STEP, STREAM)
    # nu = inf makes soft 0 for padding rows.
    nu = tl.where(has_question, nu, float("inf"))
    tl.store(soft_ptr + first + offs_e, tl.sigmoid(x - nu), mask=offs_e < size)
    for start in range(BLOCK, size, STEP):  # padding rows may exceed BLOCK without STREAM
        offs_s = start + tl.arange(0, STEP)
        next_block = _load_relaxed(x_ptr, first, size, offs_s)
        tl.store(soft_ptr + first + offs_s, tl.sigmoid(next_block - nu), mask=offs_s < size)

    code = _load_codes(key_ptr, first, size, offs_e)
    num_above = _count_above(code, order_code(bound), key_ptr, first, size, BLOCK, STEP, STREAM)
    num_selected = tl.minimum(
        tl.where(exact_k != 0, size, tl.maximum(num_above, 1)), tl.minimum(size, k)
    )
    num_selected = tl.where(has_question, num_selected, 0)
    draw_q = draw * num_questions + pid_q
    tl.store(count_ptr + draw_q, num_selected, mask=has_question)
    # The num_selected-th largest code: the smallest t with #{code > t} < num_selected, found bit by
    # bit from the highest.
    kth = tl.full((), HIGHEST, tl.int32)
    # Unsigned, because a shift of a signed number would copy the sign bit.
    bit = tl.full((), LOWEST, tl.int32).to(tl.uint32, bitcast=True)
    for _ in range(32):
        lower = kth ^ bit.to(tl.int32, bitcast=True)
        count = _count_above(code, lower, key_ptr, first, size, BLOCK, STEP, STREAM)
        kth = tl.where(count < num_selected, lower, kth)
        bit = bit >> 1

    ties_left = num_selected - _count_above(code, kth, key_ptr, first, size, BLOCK, STEP, STREAM)
    row = draw_q * k
    ties_left, row = _store_selected(
        out_fact_ptr, out_code_ptr, code, kth, ties_left, row, first, offs_e, size
    )
    if STREAM:
        for start in range(BLOCK, size, STEP):
            offs_s = start + tl.arange(0, STEP)
            next_block = _load_codes(key_ptr, first, size, offs_s)
            ties_left, row = _store_selected(
                out_fact_ptr, out_code_ptr, next_block, kth, ties_left, row, first, offs_s, size
            )


def gumbel_topk_fwd(
    x: Tensor, key: Tensor, fact_ptr: Tensor, k: int, max_facts: int, bound: float, exact_k: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches the kernel and sorts the selected facts, see `dragkit::gumbel_topk_fwd`."""
    num_questions, (num_draws, num_facts) = fact_ptr.shape[0] - 1, x.shape
    tile, stream = topk_tile(max_facts)
    selected_fact = fact_ptr.new_full((num_draws, num_questions, k), -1)
    selected_code = fact_ptr.new_full((num_draws, num_questions, k), LOWEST.value)
    count = fact_ptr.new_empty(num_draws, num_questions)
    soft = x.new_empty(num_draws, num_facts)
    _gumbel_topk_fwd_kernel[(num_questions + 1, num_draws)](
        *(x.contiguous(), key.contiguous(), fact_ptr.contiguous()),
        *(selected_fact, selected_code, count, soft),
        *(num_facts, num_questions, k, bound, int(exact_k)),
        BLOCK=tile.block,
        STEP=min(tile.block, TOPK_STEP),
        STREAM=stream,
        **tile.options,
    )
    # A stable sort keeps equal codes in the order of facts. Empty slots have the lowest code.
    order = selected_code.sort(dim=-1, stable=True, descending=True).indices
    index = selected_fact.gather(-1, order)
    return (index >= 0).to(torch.float32), soft, index, count


KERNELS = tuple(
    spec(
        _gumbel_topk_fwd_kernel,
        ResourceLimits(registers=128, shared_bytes=2048),
        tile=tile,
        constants={"STEP": min(tile.block, TOPK_STEP), "STREAM": stream},
        key_ptr="*fp32",
    )
    for tile, stream in (*((tile, False) for tile in TOPK_TILES), (TOPK_STREAM, True))
)
