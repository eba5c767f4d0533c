"""Triton forward of segment_softmax: one program per graph."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import ResourceLimits, Tile, spec

# Rows of a graph in one step.
TILE = Tile(1024, 4)
# The lowest float32. With -inf as the first maximum, -inf - -inf would be NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def graph_rows(rowptr_ptr, num_graphs, num_rows):
    """(first row, end of the graph, end of the rows to write).

    Both ends agree, except in program `num_graphs`: it has an empty graph, and writes the padding.
    """
    pid_g = tl.program_id(0)
    begin = tl.load(rowptr_ptr + pid_g)
    graph_end = tl.load(rowptr_ptr + tl.minimum(pid_g + 1, num_graphs))
    return begin, graph_end, tl.where(pid_g < num_graphs, graph_end, num_rows)


@triton.jit
def _load_scores(score_ptr, offs_n, mask_n):
    """Scores in float32, -inf at masked rows, whose exponential is 0."""
    return tl.load(score_ptr + offs_n, mask=mask_n, other=float("-inf")).to(tl.float32)


@triton.jit(do_not_specialize=["num_graphs", "num_rows"])
def _segment_softmax_fwd_kernel(
    score_ptr,
    rowptr_ptr,
    count_ptr,
    p_ptr,
    num_graphs,
    num_rows,
    BLOCK: tl.constexpr,
):
    """p_v = exp(s_v - max) / sum_u n_u exp(s_u - max) over a graph's rows, and 0 for padding.

    The first loop keeps a running maximum and the sum of exponentials relative to it.
    """
    begin, graph_end, end = graph_rows(rowptr_ptr, num_graphs, num_rows)
    max_score = LOWEST + tl.full((), 0.0, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(begin, graph_end, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        mask_n = offs_n < graph_end
        score = _load_scores(score_ptr, offs_n, mask_n)
        new_max = tl.maximum(max_score, tl.max(score, 0))
        weight = tl.exp(score - new_max)
        if count_ptr is not None:
            weight *= tl.load(count_ptr + offs_n, mask=mask_n, other=0).to(tl.float32)
        # The old sum is rescaled to the new maximum.
        total = tl.fma(total, tl.exp(max_score - new_max), tl.sum(weight, 0))
        max_score = new_max
    # The sum is zero if all scores are -inf: p is then 0 / 1 and not NaN.
    total = tl.where(total == 0.0, 1.0, total)
    # Scores are read a second time, because a graph may have more rows than a block.
    for start in range(begin, end, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        score = _load_scores(score_ptr, offs_n, offs_n < graph_end)
        tl.store(p_ptr + offs_n, tl.exp(score - max_score) / total, mask=offs_n < end)


def segment_softmax_fwd(score: Tensor, ptr: Tensor, count: Tensor | None) -> Tensor:
    """Launches the softmax (see `dragkit::segment_softmax_fwd`)."""
    p = score.new_empty(score.shape, dtype=torch.float32)
    num_graphs = ptr.shape[0] - 1
    _segment_softmax_fwd_kernel[(num_graphs + 1,)](
        score.contiguous(),
        ptr.contiguous(),
        None if count is None else count.contiguous(),
        p,
        num_graphs,
        score.shape[0],
        BLOCK=TILE.block,
        **TILE.options,
    )
    return p


KERNELS = tuple(
    spec(
        _segment_softmax_fwd_kernel,
        ResourceLimits(registers=64, shared_bytes=512),
        tile=TILE,
        score_ptr=score,
        count_ptr=count,
    )
    for score in ("*bf16", "*fp32")
    for count in ("*i32", None)
)
