"""Triton backward of gumbel_topk: noise and relaxed choice are made again, nothing was stored."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import WALK_TILES, Budget, KernelSpec, walk_tile
from .facts import CERTAIN, DRAWN, GIVEN, NO_NOISE, load_logits, question_bounds, relaxed_argument


@triton.jit
def _slope_and_grad(
    d_gate_ptr,
    d_soft_ptr,
    logits_ptr,
    noise_ptr,
    seed_ptr,
    slot_ptr,
    question_key,
    first,
    row,
    offs_e,
    mask_e,
    nu,
    temperature,
):
    """d_e = s_e (1 - s_e), g_e = d_soft_e + d_gate at e's slot, whether x_e is certain."""
    _, key = load_logits(logits_ptr, noise_ptr, seed_ptr, question_key, first, offs_e, mask_e)
    soft = tl.sigmoid(relaxed_argument(key, temperature, mask_e) - nu)
    grad = tl.load(d_soft_ptr + first + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    slot = tl.load(slot_ptr + first + offs_e, mask=mask_e, other=-1)
    grad += tl.load(d_gate_ptr + row + slot, mask=slot >= 0, other=0.0).to(tl.float32)
    certain = tl.abs(key / temperature) > CERTAIN
    return tl.where(mask_e, soft * (1.0 - soft), 0.0), grad, certain


@triton.jit(do_not_specialize=["num_facts", "num_questions", "k", "budget"])
def _gumbel_topk_bwd_logits_kernel(
    d_gate_ptr,
    d_soft_ptr,
    logits_ptr,
    noise_ptr,
    seed_ptr,
    question_key_ptr,
    fact_ptr,
    slot_ptr,
    nu_ptr,
    d_logits_ptr,
    num_facts,
    num_questions,
    k,
    temperature,
    budget,
    BLOCK: tl.constexpr,
):
    """dl_e = d_e (g_e - m) / T, m = (d . g) / sum d in a budget, else 0; 0 where x_e is certain."""
    pid_q = tl.program_id(0)
    first, size, question_key = question_bounds(
        fact_ptr, question_key_ptr, pid_q, num_questions, num_facts
    )
    row = pid_q.to(tl.int64) * k
    nu = tl.load(nu_ptr + pid_q)
    mean = tl.full((), 0.0, tl.float32)
    if budget != 0:
        slopes = tl.zeros((BLOCK,), tl.float32)
        products = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, size, BLOCK):
            offs_e = start + tl.arange(0, BLOCK)
            slope, grad, certain = _slope_and_grad(
                d_gate_ptr,
                d_soft_ptr,
                logits_ptr,
                noise_ptr,
                seed_ptr,
                slot_ptr,
                question_key,
                first,
                row,
                offs_e,
                offs_e < size,
                nu,
                temperature,
            )
            slopes += slope
            products = tl.fma(slope, grad, products)
        mean = tl.sum(products, 0) / tl.maximum(tl.sum(slopes, 0), 1e-30)
    for start in range(0, size, BLOCK):
        offs_e = start + tl.arange(0, BLOCK)
        slope, grad, certain = _slope_and_grad(
            d_gate_ptr,
            d_soft_ptr,
            logits_ptr,
            noise_ptr,
            seed_ptr,
            slot_ptr,
            question_key,
            first,
            row,
            offs_e,
            offs_e < size,
            nu,
            temperature,
        )
        d_logit = tl.where(certain, 0.0, slope * (grad - mean) / temperature)
        tl.store(d_logits_ptr + first + offs_e, d_logit, mask=offs_e < size)


def gumbel_topk_bwd(
    d_gate: Tensor,
    d_soft: Tensor,
    logits: Tensor,
    fact_ptr: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    question_key: Tensor | None,
    slot: Tensor,
    nu: Tensor,
    max_facts: int,
    temperature: float,
    budget: bool,
) -> Tensor:
    """Launches the kernel; see `dragkit::gumbel_topk_bwd`."""
    num_questions, num_facts = fact_ptr.shape[0] - 1, logits.shape[0]
    tile = walk_tile(max_facts)
    d_logits = logits.new_empty(num_facts)
    _gumbel_topk_bwd_logits_kernel[(num_questions + 1,)](
        d_gate.contiguous(),
        d_soft.contiguous(),
        logits.contiguous(),
        None if noise is None else noise.contiguous(),
        seed,
        None if seed is None else question_key.contiguous(),
        fact_ptr.contiguous(),
        slot,
        nu,
        d_logits,
        num_facts,
        num_questions,
        d_gate.shape[1],
        temperature,
        int(budget),
        BLOCK=tile.block,
        num_warps=tile.num_warps,
    )
    return d_logits


_TYPES = {
    "d_gate_ptr": "*fp32",
    "d_soft_ptr": "*fp32",
    "logits_ptr": "*fp32",
    "fact_ptr": "*i32",
    "slot_ptr": "*i32",
    "nu_ptr": "*fp32",
    "d_logits_ptr": "*fp32",
    "num_facts": "i32",
    "num_questions": "i32",
    "k": "i32",
    "temperature": "fp32",
    "budget": "i32",
}
KERNELS = tuple(
    KernelSpec(
        _gumbel_topk_bwd_logits_kernel,
        types={**_TYPES, **noise},
        constants={"BLOCK": tile.block},
        num_warps=tile.num_warps,
        budget=Budget(registers=128, shared=2048),
    )
    for tile in WALK_TILES
    for noise in (DRAWN, GIVEN, NO_NOISE)
)
