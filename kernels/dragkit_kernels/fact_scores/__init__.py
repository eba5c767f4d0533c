"""The linear fact head: one score per fact from three scalar tables."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_float, check_index, check_shape, widest
from ..orders import FactGroups, FactIndex
from . import op as _op  # noqa: F401  (registers the ops)
from .reference import fact_scores_ref

__all__ = ["fact_scores", "fact_scores_ref"]


def fact_scores(
    head_score: Tensor,
    pair_score: Tensor,
    tail_score: Tensor,
    bias: Tensor,
    *,
    fact_index: FactIndex,
    groups: FactGroups | None = None,
    backend: str = "auto",
) -> Tensor:
    """l_e = head_score[head_q] + pair_score[pair_q] + tail_score[tail_q] + bias, with q = row_e.

    This is w . [h_head ; x_relation ; h_tail] + b without the [E, 3C] tensor: callers compute the
    three dot products per node and per (graph, relation) pair. Gradients are sums in a fixed order.

    Args:
        head_score, tail_score: float [N].
        pair_score: float [P].
        bias: float [].
        fact_index: Q merged facts.
        groups: the E facts that these stand for. None if no facts were merged: E = Q.
        backend: "auto", "triton" or "torch".

    Returns:
        float32 [E] logits in triple order (float64 if an argument is float64).

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    op, facts = "fact_scores", fact_index
    check_shape(op, "head_score", head_score, (facts.num_nodes,))
    check_shape(op, "pair_score", pair_score, (facts.num_pairs,))
    check_shape(op, "tail_score", tail_score, (facts.num_nodes,))
    check_shape(op, "bias", bias, ())
    check_float(op, head_score=head_score, pair_score=pair_score, tail_score=tail_score, bias=bias)
    check_index(op, **{"fact_index.head": facts.head, "fact_index.fact_pair": facts.fact_pair})
    if groups is not None:
        check_shape(op, "groups.ptr", groups.ptr, (facts.num_facts + 1,))
        check_shape(op, "groups.fact", groups.fact, tuple(groups.row.shape))
        check_index(op, **{f"groups.{name}": x for name, x in groups._asdict().items()})
    scores = (head_score, pair_score, tail_score, bias)
    triton = resolve_backend(op, widest(*scores), backend) == "triton"
    gathers = [facts.head, facts.fact_pair, facts.tail]
    sums = [facts.head_ptr, facts.head_perm, facts.pair_ptr, facts.pair_perm]
    sums += [facts.tail_ptr, facts.tail_perm]
    if groups is not None:
        gathers, sums = [*gathers, groups.row], [*sums, groups.ptr, groups.fact]
    return torch.ops.dragkit.fact_scores_fwd(*scores, gathers, sums, triton)
