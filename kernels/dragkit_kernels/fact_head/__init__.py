"""The linear fact head: a score per fact from three scalar tables, and the loss of the scores."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_float, check_index, check_shape, widest
from ..orders import FactGroups, FactOrders
from ..segments import longest
from . import loss_op as _loss_op  # noqa: F401  (registers the ops)
from . import op as _op  # noqa: F401  (registers the ops)
from .reference import fact_loss_ref, fact_scores_ref

__all__ = ["fact_loss", "fact_loss_ref", "fact_scores", "fact_scores_ref"]


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
        orders: Q facts; groups: the E facts that they stand for; None where each is its own.
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
    return torch.ops.dragkit.fact_scores_fwd(
        *scores,
        orders.head,
        orders.tail,
        orders.fact_pair,
        orders.head_ptr,
        orders.head_fact,
        orders.pair_ptr,
        orders.pair_fact,
        orders.tail_ptr,
        orders.tail_fact,
        *(groups or (None, None, None)),
        triton,
    )


def fact_loss(
    logits: Tensor,
    label: Tensor,
    fact_ptr: Tensor,
    *,
    rho: float,
    margin: float,
    max_facts: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """rho * BCE + (1 - rho) * rank of every question, the loss of D-RAG's phase 1.

        BCE  = (1/n) sum_e softplus(l_e) - y_e l_e            dBCE/dl_e = (sigmoid(l_e) - y_e) / n
        rank = (1/PN) sum_{p, q} max(0, m - (l_p - l_q))      dR/dl_p = -#{q: l_q > l_p - m} / PN

    and dR/dl_q = +#{p: l_p < l_q + m} / PN, over the n facts of a question, its P positives p
    (y = 1) and its N negatives q; rank is 0 without pairs. A question without a positive
    says nothing about which facts are relevant: its loss is 0, whatever its logits are. So is the
    gradient of a pair exactly at the margin. The gradient comes with the value, in closed form.

    An infinite logit counts as the limit: no BCE on its right side, and two equal ones violate no
    margin. NaN makes the loss and the gradient of its question NaN, and of no other.

    Args:
        logits: float [E]; rows at or after `fact_ptr[-1]` are padding, without part or gradient.
        label: float [E], y: above 1/2 is a positive, 1, the rest is 0; gets no gradient.
        fact_ptr: int32 [B+1] first fact of each question.
        rho: weight of the BCE.
        margin: m, in logits.
        max_facts: at least the facts of every question; without it the device may be asked.
        backend: "auto", "triton" or "torch".

    Returns:
        float32 [B] (float64 for float64 logits).

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    op = "fact_loss"
    check_shape(op, "logits", logits, (None,))
    check_shape(op, "label", label, tuple(logits.shape))
    check_shape(op, "fact_ptr", fact_ptr, (None,))
    check_float(op, logits=logits, label=label)
    check_index(op, fact_ptr=fact_ptr)
    triton = resolve_backend(op, logits, backend) == "triton"
    if max_facts is None:
        max_facts = longest(fact_ptr) if triton else 0
    loss, _ = torch.ops.dragkit.fact_loss_fwd(
        logits, label.detach(), fact_ptr, rho, margin, max_facts, triton
    )
    return loss
