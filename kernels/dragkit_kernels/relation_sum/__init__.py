"""Initial node states: every node sums the rows of its incident facts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_float, check_shape
from ..orders import FactIndex, check_fact_index
from . import op as _op  # noqa: F401  (registers the ops)
from .reference import relation_sum_ref

__all__ = ["relation_sum", "relation_sum_ref"]


def relation_sum(table: Tensor, *, fact_index: FactIndex, backend: str = "auto") -> Tensor:
    """out_v = sum_{e: tail=v} n_e table[pair_e] + sum_{e: head=v} m_e table[pair_e]

    with n = `tail_count` and m = `head_count` of the index. Sums run in float32 (float64 for
    float64) and in a fixed order.

    Args:
        table: float [P, C], one row per (graph, relation) pair.
        fact_index: the facts.
        backend: "auto", "triton" or "torch".

    Returns:
        [N, C] with the dtype of `table`. A node without facts gets zeros.

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    check_shape("relation_sum", "table", table, (fact_index.num_pairs, None))
    check_float("relation_sum", table=table)
    check_fact_index("relation_sum", fact_index)
    triton = resolve_backend("relation_sum", table, backend) == "triton"
    return torch.ops.dragkit.relation_sum_fwd(table, list(fact_index), triton)
