"""The loss of the retriever on logits, and its balance with the loss of the generator."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dragkit_kernels import fact_loss


def retrieval_loss(
    logits: Tensor, label: Tensor, fact_ptr: Tensor, *, rho: float, margin: float
) -> Tensor:
    """rho * BCE + (1 - rho) * rank, summed over the questions that have a positive fact.

    A question without a positive fact does not tell which facts are relevant, so it is left out.
    `fact_loss` defines the two terms.

    Args:
        logits: float32 [E].
        label: float [E], 1 for a positive fact.
        fact_ptr: int32 [B+1] first fact of each question.
        rho: weight of the BCE.
        margin: margin of the ranking hinge.

    Returns:
        float32 [].
    """
    return fact_loss(logits, label, fact_ptr, rho=rho, margin=margin).sum()


def balance_weight(generator_gradient: Tensor, retriever_gradient: Tensor, rho: float) -> Tensor:
    """Returns rho * |g_gen| / |g_ret|, the weight of the retrieval loss at the fact logits.

    Args:
        generator_gradient, retriever_gradient: float [E] gradients of both losses at the logits.
        rho: ratio of the norms after weighting.
    """
    return rho * generator_gradient.norm() / (retriever_gradient.norm() + 1e-12)


def leave_one_out_weight(loss: Tensor) -> Tensor:
    """Weights of the draws' scores in the gradient of the expected loss (Kool et al., 2019).

    Each draw is weighted by the difference of its loss to the mean loss of the other draws. The
    gradient is unbiased.

    Args:
        loss: float [M, B] loss of draw m of question b, with M >= 2.

    Returns:
        float [M, B], with sum 0 over the draws.
    """
    # loss - (sum - loss) / (M - 1), divided by M for the mean over draws.
    return (loss - loss.mean(0)) / (loss.shape[0] - 1)


def posterior_weight(loss: Tensor) -> Tensor:
    """Weights of the draws' scores in the gradient of -log E[exp(-loss)] (Bornschein and Bengio).

    The gradient is minus the mean of the scores under the posterior of the draw given the answer.
    The posterior is estimated by M draws, with a bias of order 1 / M. A weight is within 1 of 0,
    whatever the losses.

    Args:
        loss: float [M, B] negative log-likelihood of the answer given draw m of question b.

    Returns:
        float [M, B], with sum 0 over the draws.
    """
    return 1 / loss.shape[0] - (-loss).softmax(0)


def draw_gradient(weight: Tensor, score: Tensor, fact_graph: Tensor) -> Tensor:
    """Sum of the draws' scores by weight, at the fact logits.

    Args:
        weight: float [M, B] weight of draw m of question b.
        score: float [M, E] gradient of the log-probability of draw m, see `draw_score`.
        fact_graph: int [E] question of each fact. Padding rows have B.

    Returns:
        float [E].
    """
    return (F.pad(weight, (0, 1)).index_select(1, fact_graph) * score).sum(0)
