"""Softmax over the nodes of each graph of a pack."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_float, check_index, check_shape
from . import op as _op  # noqa: F401  (registers the ops)
from .reference import segment_softmax_ref

__all__ = ["segment_softmax", "segment_softmax_ref"]


def segment_softmax(
    score: Tensor,
    ptr: Tensor,
    mask: Tensor | None = None,
    *,
    count: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """p_v = exp(s_v) / sum_u n_u exp(s_u), u over the unmasked nodes of v's graph.

    A masked node gets 0 and no gradient. A graph without nodes, or with all of them masked, gives
    zeros, not NaN; so do rows after `ptr[-1]` (padding). Backward: ds = p (dp - n sum p dp).

    Args:
        score: float [N].
        ptr: int32 [B+1] first node of each graph.
        mask: bool [N], True where a node takes part; None means all.
        count: int32 [N] equal nodes that a row stands for, n; None means ones. The result is the
            share of a single one of them.
        backend: "auto", "triton" or "torch".

    Returns:
        float32 [N] (float64 for float64 scores), whatever the score's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    check_shape("segment_softmax", "score", score, (None,))
    check_shape("segment_softmax", "ptr", ptr, (None,))
    check_float("segment_softmax", score=score)
    check_index("segment_softmax", ptr=ptr)
    if mask is not None:
        check_shape("segment_softmax", "mask", mask, tuple(score.shape))
        if mask.dtype != torch.bool:
            raise ValueError(f"segment_softmax: mask must be bool, got {mask.dtype}")
    if count is not None:
        check_shape("segment_softmax", "count", count, tuple(score.shape))
        check_index("segment_softmax", count=count)
    triton = resolve_backend("segment_softmax", score, backend) == "triton"
    return torch.ops.dragkit.segment_softmax_fwd(score, ptr, mask, count, triton)
