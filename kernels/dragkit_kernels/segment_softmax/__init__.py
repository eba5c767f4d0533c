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
    *,
    count: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """p_v = exp(s_v) / sum_u n_u exp(s_u), u over the nodes of v's graph.

    Backward: ds_v = p_v (dp_v - n_v sum_u p_u dp_u).

    Args:
        score: float [N]. Rows at or after `ptr[-1]` are padding.
        ptr: int32 [B+1] first node of each graph.
        count: int32 [N] number n of equal nodes that a row stands for. None means ones. The result
            is the probability of one of these nodes.
        backend: "auto", "triton" or "torch".

    Returns:
        float32 [N] (float64 for float64 scores). Padding, and the nodes of a graph whose scores are
        all -inf, get 0 and no gradient.

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    check_shape("segment_softmax", "score", score, (None,))
    check_shape("segment_softmax", "ptr", ptr, (None,))
    check_float("segment_softmax", score=score)
    check_index("segment_softmax", ptr=ptr)
    if count is not None:
        check_shape("segment_softmax", "count", count, tuple(score.shape))
        check_index("segment_softmax", count=count)
    triton = resolve_backend("segment_softmax", score, backend) == "triton"
    return torch.ops.dragkit.segment_softmax_fwd(score, ptr, count, triton)
