"""The prompt of perfect retrieval: positive facts in place of retrieved ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dragkit.data.packed import PackedGraph
from dragkit_kernels import FactSelection, top_facts


def gold_facts(logits: Tensor, graph: PackedGraph, retrieved: FactSelection) -> FactSelection:
    """Selects the positive facts of each question, the most probable ones if there are too many.

    A question without a positive fact keeps its retrieved facts.

    Args:
        logits: float32 [E].
        graph: the packed graphs with their labels.
        retrieved: selection of at most K facts per question.

    Returns:
        Selection of at most K facts per question, without a gradient.
    """
    is_gold = graph.label > 0.5
    gold = top_facts(
        logits.masked_fill(~is_gold, -math.inf),
        graph.fact_ptr,
        retrieved.index.shape[1],
        max_facts=graph.max_facts,
    )
    has_gold = torch.zeros_like(retrieved.count, dtype=torch.bool)
    has_gold[graph.fact_graph[is_gold].long()] = True
    return retrieved._replace(
        index=torch.where(has_gold[:, None], gold.index, retrieved.index),
        gate=torch.where(has_gold[:, None], gold.gate, retrieved.gate),
        count=torch.where(has_gold, gold.count, retrieved.count),
    )
