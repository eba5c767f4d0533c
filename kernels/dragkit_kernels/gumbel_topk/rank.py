"""Sorts the kept facts of every question, best first."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import RANK_STEP, RANK_TILE, Budget, KernelSpec


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
    """index[q, r_i] = kept_i, slot[kept_i] = r_i, r_i = #{j: code_j > code_i, or equal, j < i}."""
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


def gumbel_topk_fwd_rank(
    kept_fact: Tensor, kept_code: Tensor, count: Tensor, index: Tensor, gate: Tensor, slot: Tensor
) -> None:
    """Fills index and gate [B, k], and slot [E] at the kept facts, from unsorted kept facts."""
    num_questions, k = index.shape
    if num_questions * k == 0:
        return
    _gumbel_topk_fwd_rank_kernel[(num_questions, triton.cdiv(k, RANK_TILE.block))](
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


KERNELS = (
    KernelSpec(
        _gumbel_topk_fwd_rank_kernel,
        types={
            "kept_fact_ptr": "*i32",
            "kept_code_ptr": "*i32",
            "count_ptr": "*i32",
            "index_ptr": "*i32",
            "gate_ptr": "*fp32",
            "slot_ptr": "*i32",
            "k": "i32",
        },
        constants={"BLOCK": RANK_TILE.block, "STEP": RANK_STEP},
        num_warps=RANK_TILE.num_warps,
        budget=Budget(registers=96, shared=2048),
    ),
)
