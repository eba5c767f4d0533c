"""The loss of fact scores: cross entropy and ranking within every question."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_float, check_index, check_shape
from . import op as _op  # noqa: F401  (registers the ops)
from .reference import fact_loss_ref

__all__ = ["fact_loss", "fact_loss_ref"]


def fact_loss(
    logits: Tensor, label: Tensor, fact_ptr: Tensor, *, rho: float, margin: float
) -> Tensor:
    """rho * BCE + (1 - rho) * rank of every question, the loss of D-RAG's phase 1.

        BCE  = (1/n) sum_e softplus(l_e) - y_e l_e            dBCE/dl_e = (sigmoid(l_e) - y_e) / n
        rank = (1/PN) sum_{p, q} max(0, m - (l_p - l_q))      dR/dl_p = -#{q: l_q > l_p - m} / PN
                                                              dR/dl_q = +#{p: l_p < l_q + m} / PN

    over the n facts of a question, its P positives p (y = 1) and its N negatives q. The forward
    computes the gradient too, in this closed form.

    Edge cases: rank is 0 if P or N is 0. A question without a positive has loss 0, because its
    labels do not say which facts are relevant. A pair exactly at the margin has no gradient. An
    infinite logit counts as the limit: its BCE is 0 on the right side, and two equal infinities
    violate no margin. NaN makes the loss and the gradient of its question NaN, and of no other.

    Args:
        logits: float [E]. Rows at or after `fact_ptr[-1]` are padding, without loss or gradient.
        label: float [E]. Above 1/2 is a positive. It gets no gradient.
        fact_ptr: int32 [B+1] first fact of each question.
        rho: weight of the BCE.
        margin: m, in logits.

    Returns:
        float32 [B] (float64 for float64 logits).

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    op = "fact_loss"
    check_shape(op, "logits", logits, (None,))
    check_shape(op, "label", label, tuple(logits.shape))
    check_shape(op, "fact_ptr", fact_ptr, (None,))
    check_float(op, logits=logits, label=label)
    check_index(op, fact_ptr=fact_ptr)
    return torch.ops.dragkit.fact_loss_fwd(logits, label.detach(), fact_ptr, rho, margin)[0]
