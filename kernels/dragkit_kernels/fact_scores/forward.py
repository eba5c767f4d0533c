"""Triton forward of fact_scores: three scalar gathers per fact."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import ResourceLimits, Tile, spec

TILE = Tile(1024, 4)


@triton.jit(do_not_specialize=["num_facts"])
def _fact_scores_fwd_kernel(
    head_score_ptr,
    pair_score_ptr,
    tail_score_ptr,
    bias_ptr,
    head_ptr,
    pair_ptr,
    tail_ptr,
    group_row_ptr,
    score_ptr,
    num_facts,
    BLOCK: tl.constexpr,
):
    """l_e = a[head_q] + b[pair_q] + c[tail_q] + bias, with q = row_e, or q = e without groups."""
    offs_e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask_e = offs_e < num_facts
    # Facts of a question read the scores of the merged fact that stands for them.
    row = offs_e
    if group_row_ptr is not None:
        row = tl.load(group_row_ptr + offs_e, mask=mask_e, other=0)
    head = tl.load(head_ptr + row, mask=mask_e, other=0)
    pair = tl.load(pair_ptr + row, mask=mask_e, other=0)
    tail = tl.load(tail_ptr + row, mask=mask_e, other=0)
    score = tl.load(head_score_ptr + head, mask=mask_e, other=0.0).to(tl.float32)
    score += tl.load(pair_score_ptr + pair, mask=mask_e, other=0.0).to(tl.float32)
    score += tl.load(tail_score_ptr + tail, mask=mask_e, other=0.0).to(tl.float32)
    score += tl.load(bias_ptr).to(tl.float32)
    tl.store(score_ptr + offs_e, score, mask=mask_e)


def fact_scores_fwd(
    head_score: Tensor,
    pair_score: Tensor,
    tail_score: Tensor,
    bias: Tensor,
    gathers: list[Tensor],
    sums: list[Tensor],
) -> Tensor:
    """Launches the gathers (see `dragkit::fact_scores_fwd`)."""
    score = head_score.new_empty(gathers[-1].shape, dtype=torch.float32)
    num_facts = score.shape[0]
    if num_facts == 0:
        return score
    inputs = (head_score, pair_score, tail_score, bias, *gathers)
    _fact_scores_fwd_kernel[(triton.cdiv(num_facts, TILE.block),)](
        *(x.contiguous() for x in inputs),
        *([None] if len(gathers) == 3 else []),
        score,
        num_facts,
        BLOCK=TILE.block,
        **TILE.options,
    )
    return score


KERNELS = tuple(
    spec(
        _fact_scores_fwd_kernel,
        ResourceLimits(registers=80, shared_bytes=0),
        tile=TILE,
        dtype=dtype,
        bias_ptr="*fp32",
        group_row_ptr=group_row,
        score_ptr="*fp32",
    )
    for dtype in ("*bf16", "*fp32")
    for group_row in ("*i32", None)
)
