"""Triton backward of segment_softmax: one program per graph."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import ResourceLimits, spec
from .forward import TILE, graph_rows


@triton.jit(do_not_specialize=["num_graphs", "num_rows"])
def _segment_softmax_bwd_kernel(
    grad_ptr,
    p_ptr,
    rowptr_ptr,
    count_ptr,
    d_score_ptr,
    num_graphs,
    num_rows,
    BLOCK: tl.constexpr,
):
    """ds_v = p_v (dp_v - n_v sum_u p_u dp_u), the sum over v's graph, and 0 for padding."""
    begin, graph_end, end = graph_rows(rowptr_ptr, num_graphs, num_rows)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, graph_end, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        mask_n = offs_n < graph_end
        p = tl.load(p_ptr + offs_n, mask=mask_n, other=0.0)
        acc = tl.fma(p, tl.load(grad_ptr + offs_n, mask=mask_n, other=0.0), acc)
    total = tl.sum(acc, 0)
    # The second loop also covers padding, where p is masked to 0, and so is the gradient.
    for start in range(begin, end, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        mask_n = offs_n < graph_end
        p = tl.load(p_ptr + offs_n, mask=mask_n, other=0.0)
        counted_total = total + tl.zeros((BLOCK,), tl.float32)
        if count_ptr is not None:
            counted_total *= tl.load(count_ptr + offs_n, mask=mask_n, other=0).to(tl.float32)
        d_score = p * (tl.load(grad_ptr + offs_n, mask=mask_n, other=0.0) - counted_total)
        tl.store(d_score_ptr + offs_n, d_score, mask=offs_n < end)


def segment_softmax_bwd(grad: Tensor, p: Tensor, ptr: Tensor, count: Tensor | None) -> Tensor:
    """Launches the gradient (see `dragkit::segment_softmax_bwd`)."""
    d_score = p.new_empty(p.shape)
    num_graphs = ptr.shape[0] - 1
    _segment_softmax_bwd_kernel[(num_graphs + 1,)](
        grad.contiguous(),
        p.contiguous(),
        ptr.contiguous(),
        None if count is None else count.contiguous(),
        d_score,
        num_graphs,
        p.shape[0],
        BLOCK=TILE.block,
        **TILE.options,
    )
    return d_score


KERNELS = tuple(
    spec(
        _segment_softmax_bwd_kernel,
        ResourceLimits(registers=64, shared_bytes=512),
        tile=TILE,
        count_ptr=count,
    )
    for count in ("*i32", None)
)
