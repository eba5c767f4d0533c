"""Losses of the retriever and their balance with the generator's loss; everything on logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _per_graph_sum(value: Tensor, graph: Tensor, num_graphs: int) -> Tensor:
    return value.new_zeros(num_graphs).index_add(0, graph, value)


def ranking_loss(
    logits: Tensor, label: Tensor, graph: Tensor, num_graphs: int, margin: float
) -> Tensor:
    """Mean hinge max(0, m - (l_pos - l_neg)) over each graph's (positive, negative) pairs.

    The pairs are never formed: with every positive shifted by the margin, one sort per graph counts
    for each fact how many partners violate the margin, and the loss is linear in the logits given
    those counts.

    Args:
        logits: float32 [E]; label: float [E] 0/1; graph: int [E], non-decreasing.
        num_graphs: B; margin: in logits.

    Returns:
        float32 [B]; 0 where a graph has no pair.
    """
    positive = label > 0.5
    with torch.no_grad():
        shifted = torch.where(positive, logits - margin, logits)
        order = torch.argsort(shifted, stable=True)
        order = order[torch.argsort(graph[order], stable=True)]
        flag = positive[order].to(torch.float64)
        owner = graph[order].long()
        total_pos = _per_graph_sum(flag, owner, num_graphs)
        total_neg = _per_graph_sum(1 - flag, owner, num_graphs)
        before_pos = (total_pos.cumsum(0) - total_pos)[owner]
        before_neg = (total_neg.cumsum(0) - total_neg)[owner]
        positives_below = flag.cumsum(0) - flag - before_pos
        negatives_above = total_neg[owner] - ((1 - flag).cumsum(0) - before_neg)
        pairs = (total_pos * total_neg).clamp(min=1)[owner]
        # A positive pairs with the negatives above its shifted value, a negative with the positives
        # below it; both counts describe the same set of violating pairs.
        weight = torch.where(flag > 0, -negatives_above, positives_below) / pairs
        coefficient = torch.empty_like(weight).scatter_(0, order, weight)
        constant = _per_graph_sum(-margin * weight * flag, owner, num_graphs)
    coefficient = coefficient.to(logits.dtype)
    return _per_graph_sum(coefficient * logits, graph, num_graphs) + constant.to(logits.dtype)


def retrieval_loss(
    logits: Tensor,
    label: Tensor,
    graph: Tensor,
    num_graphs: int,
    *,
    rho: float,
    margin: float,
) -> tuple[Tensor, Tensor]:
    """rho * BCE + (1 - rho) * rank, summed over the questions that have a positive fact.

    A question without any positive fact says nothing about which facts are relevant, so it has no
    part in the loss; divide by the count to get a mean.

    Args:
        logits: float32 [E]; label: float [E]; graph: int [E]; num_graphs: B.
        rho: weight of the BCE; margin: of the ranking hinge.

    Returns:
        The sum, float32 [], and the number of questions in it, float32 [].
    """
    graph = graph.long()
    ones = torch.ones_like(label)
    facts = _per_graph_sum(ones, graph, num_graphs)
    labelled = (_per_graph_sum(label, graph, num_graphs) > 0).to(logits.dtype)
    bce = F.binary_cross_entropy_with_logits(logits, label.to(logits.dtype), reduction="none")
    bce = _per_graph_sum(bce, graph, num_graphs) / facts.clamp(min=1)
    rank = ranking_loss(logits, label, graph, num_graphs, margin)
    loss = rho * bce + (1 - rho) * rank
    return (loss * labelled).sum(), labelled.sum()


def balance_weight(generator_gradient: Tensor, retriever_gradient: Tensor, rho: float) -> Tensor:
    """rho * |g_gen| / |g_ret|, the weight of the retrieval loss at the fact logits."""
    return rho * generator_gradient.norm() / (retriever_gradient.norm() + 1e-12)
