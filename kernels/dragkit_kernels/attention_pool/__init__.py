"""Attention pooling over ragged segments of frozen states, without gathering them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_float, check_index, check_shape
from . import op as _op  # noqa: F401  (registers the ops)
from .reference import attention_pool_ref

__all__ = ["attention_pool", "attention_pool_ref"]


def attention_pool(states: Tensor, query: Tensor, rows: Tensor, ptr: Tensor) -> Tensor:
    """o_g = sum_i a_i states[rows_i] with a = softmax of <states[rows_i], query> over segment g.

    Args:
        states: float32 or float64 [T, D], frozen.
        query: [D] with the dtype of `states`.
        rows: int32 [S] rows of `states`.
        ptr: int32 [G+1]. Segment g is rows[ptr[g]:ptr[g+1]]. The segments cover all of `rows`.

    Returns:
        [G, D] with the dtype of `states`. A segment without rows gives zeros.

    Raises:
        ValueError: shapes or dtypes do not fit, or `states` requires a gradient.
    """
    op = "attention_pool"
    check_shape(op, "states", states, (None, None))
    check_shape(op, "query", query, (states.shape[1],))
    check_shape(op, "rows", rows, (None,))
    check_shape(op, "ptr", ptr, (None,))
    check_float(op, states=states, query=query)
    check_index(op, rows=rows, ptr=ptr)
    if states.dtype not in (torch.float32, torch.float64) or query.dtype != states.dtype:
        raise ValueError(
            f"{op}: states and query must both be float32 or both float64, got {states.dtype} and "
            f"{query.dtype}"
        )
    if states.requires_grad:
        raise ValueError(
            f"{op}: states must not require a gradient: the op computes that of query only"
        )
    return torch.ops.dragkit.attention_pool_fwd(states, query, rows, ptr)[0]
