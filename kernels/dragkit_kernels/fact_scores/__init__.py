"""The linear fact head: a score per fact from three scalar tables."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_float, check_index, check_shape, widest
from ..orders import FactGroups, FactOrders
from . import op as _op  # noqa: F401  (registers the ops)
from .reference import fact_scores_ref

__all__ = ["fact_scores", "fact_scores_ref"]


def fact_scores(
    head_score: Tensor,
    pair_score: Tensor,
    tail_score: Tensor,
    bias: Tensor,
    *,
    orders: FactOrders,
    groups: FactGroups | None = None,
    backend: str = "auto",
) -> Tensor:
    """l_e = head_score[head_q] + pair_score[pair_q] + tail_score[tail_q] + bias, with q = row_e.

    This is w . [h_head ; x_relation ; h_tail] + b without the [E, 3C] tensor: the three dot
    products are taken per node and per (graph, relation) pair. Gradients are sums in a fixed order.

    Args:
        head_score, tail_score: float [N].
        pair_score: float [P].
        bias: float [].
        orders: Q facts; groups: the E facts that these stand for; None if each is its own.
        backend: "auto", "triton" or "torch".

    Returns:
        float32 [E] logits in triple order (float64 if an argument is).

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    op = "fact_scores"
    check_shape(op, "head_score", head_score, (orders.num_nodes,))
    check_shape(op, "pair_score", pair_score, (orders.num_pairs,))
    check_shape(op, "tail_score", tail_score, (orders.num_nodes,))
    check_shape(op, "bias", bias, ())
    check_float(op, head_score=head_score, pair_score=pair_score, tail_score=tail_score, bias=bias)
    check_index(op, **{"orders.head": orders.head, "orders.fact_pair": orders.fact_pair})
    if groups is not None:
        check_shape(op, "groups.ptr", groups.ptr, (orders.num_facts + 1,))
        check_shape(op, "groups.fact", groups.fact, tuple(groups.row.shape))
        check_index(op, **{f"groups.{name}": x for name, x in groups._asdict().items()})
    scores = (head_score, pair_score, tail_score, bias)
    triton = resolve_backend(op, widest(*scores), backend) == "triton"
    facts = [orders.head, orders.fact_pair, orders.tail]
    sums = [orders.head_ptr, orders.head_fact, orders.pair_ptr, orders.pair_fact]
    sums += [orders.tail_ptr, orders.tail_fact]
    if groups is not None:
        facts, sums = [*facts, groups.row], [*sums, groups.ptr, groups.fact]
    return torch.ops.dragkit.fact_scores_fwd(*scores, facts, sums, triton)
