"""Losses of the retriever and their balance with the generator's loss; everything on logits."""

from __future__ import annotations

from torch import Tensor

from dragkit_kernels import fact_loss


def retrieval_loss(
    logits: Tensor, label: Tensor, fact_ptr: Tensor, *, rho: float, margin: float
) -> Tensor:
    """rho * BCE + (1 - rho) * rank, summed over the questions that have a positive fact.

    A question without any positive fact does not say which facts are relevant, so it has no part
    in the loss. See `fact_loss` for the two terms.

    Args:
        logits: float32 [E]; label: float [E]; fact_ptr: int32 [B+1] first fact of each question.
        rho: weight of the BCE; margin: of the ranking hinge.

    Returns:
        float32 [].
    """
    return fact_loss(logits, label, fact_ptr, rho=rho, margin=margin).sum()


def balance_weight(generator_gradient: Tensor, retriever_gradient: Tensor, rho: float) -> Tensor:
    """rho * |g_gen| / |g_ret|, the weight of the retrieval loss at the fact logits."""
    return rho * generator_gradient.norm() / (retriever_gradient.norm() + 1e-12)
