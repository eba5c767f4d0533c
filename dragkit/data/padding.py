"""Pads batches to a few fixed sizes, so that captured CUDA graphs and compiled code can be reused.

The padding is one more graph without labels. Its facts are in no node's or pair's segment, so
nothing of a real graph depends on them and no gradient comes from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dragkit.data.packed import PackedGraph, QuestionBatch, TokenPack
from dragkit_kernels import FactGroups, FactIndex

BUCKET_GROWTH = 1.25


class Capacity(NamedTuple):
    """The sizes of a batch that determine tensor shapes.

    `merged_facts` and `pairs` are sizes of `PackedGraph.fact_index`, `topic_facts` and
    `topic_pairs` those of `PackedGraph.topic_facts`. `max_facts` is of one graph and selects the
    tiles of a kernel. `question_tokens` is the width of `question_states`.
    """

    graphs: int
    nodes: int
    merged_facts: int
    facts: int
    max_facts: int
    pairs: int
    topic_facts: int
    topic_pairs: int
    topics: int
    relations: int
    relation_tokens: int
    question_tokens: int

    def holds(self, other: Capacity) -> bool:
        """Whether every size is at least the other's."""
        return all(size >= needed for size, needed in zip(self, other, strict=True))


def required_capacity(batch: QuestionBatch) -> Capacity:
    """Returns the smallest capacity of a batch: one more of everything, for padding to point at."""
    graph = batch.graph
    sizes = (
        graph.num_graphs,
        graph.num_nodes,
        graph.fact_index.num_facts,
        graph.num_facts,
        graph.max_facts,
        graph.fact_index.num_pairs,
        graph.topic_facts.num_facts,
        graph.topic_facts.num_pairs,
        graph.topic_node.shape[0],
        batch.relation_row.shape[0],
        batch.relation_tokens.ids.shape[0],
        batch.question_states.shape[1],
    )
    return Capacity(*(size + 1 for size in sizes))


class Buckets:
    """Capacities in fixed proportions, a factor of `BUCKET_GROWTH` apart.

    The sizes of a data set's batches grow together, so one number, the level, sets them all.
    Rounding each size separately would give nearly as many capacities as batches.

    Args:
        samples: typical batches. Level 0 is the maximum of their sizes. `capacity` depends on
            these and on its argument, never on batches seen before.

    Raises:
        ValueError: `samples` is empty.
    """

    def __init__(self, samples: Sequence[QuestionBatch]) -> None:
        if not samples:
            raise ValueError("Buckets: at least one batch is needed")
        needed = map(required_capacity, samples)
        self.base = Capacity(*(max(sizes) for sizes in zip(*needed, strict=True)))

    def at_level(self, level: int) -> Capacity:
        """Returns the capacity of a level, which may be negative."""
        return Capacity(*(math.ceil(size * BUCKET_GROWTH**level) for size in self.base))

    def capacity(self, batch: QuestionBatch) -> Capacity:
        """Returns the smallest capacity that holds the batch."""
        needed, level = required_capacity(batch), 0
        while not self.at_level(level).holds(needed):
            level += 1
        while self.at_level(level - 1).holds(needed):
            level -= 1
        return self.at_level(level)


def _fill(tensor: Tensor, size: int, value: int) -> Tensor:
    """Copies a tensor into one with `size` rows and sets the added rows to `value`."""
    # A batch has about forty of these. NumPy calls cost less than torch calls.
    source = tensor.numpy()
    out = np.empty(size, dtype=source.dtype)
    out[: len(source)] = source
    out[len(source) :] = value
    return torch.from_numpy(out)


def _spread(tensor: Tensor, size: int, first: int, last: int) -> Tensor:
    """Copies a tensor into one with `size` rows. The added ones ascend from `first` to `last`."""
    source = tensor.numpy()
    num_added = size - len(source)
    added = first + np.arange(num_added) * (last - first + 1) // max(num_added, 1)
    return torch.from_numpy(np.concatenate([source, added.astype(source.dtype)]))


def _pad_ptr(ptr: Tensor, segments: int) -> Tensor:
    """Extends offsets to `segments` segments. The added ones are empty."""
    return _fill(ptr, segments + 1, ptr.numpy()[-1])


def _pad_fact_index(
    fact_index: FactIndex, rows: int, pairs: int, relations: tuple[int, int], capacity: Capacity
) -> FactIndex:
    """Adds facts of weight 0 from the last node to itself.

    Args:
        fact_index: index of the real facts.
        rows, pairs: number of facts and pairs with padding.
        relations: first and last of the added relations, which the added pairs share out.
        capacity: capacity of the batch.
    """
    node, fact = capacity.nodes - 1, rows - 1
    return FactIndex(
        head=_fill(fact_index.head, rows, node),
        tail=_fill(fact_index.tail, rows, node),
        tail_ptr=_pad_ptr(fact_index.tail_ptr, capacity.nodes),
        tail_perm=_fill(fact_index.tail_perm, rows, fact),
        head_ptr=_pad_ptr(fact_index.head_ptr, capacity.nodes),
        head_perm=_fill(fact_index.head_perm, rows, fact),
        pair_ptr=_pad_ptr(fact_index.pair_ptr, pairs),
        pair_perm=_fill(fact_index.pair_perm, rows, fact),
        # Ascending keeps the order of the pairs. Spreading avoids one relation with all added
        # pairs, which would be the longest row of the gates' backward sum.
        pair_relation=_spread(fact_index.pair_relation, pairs, *relations),
        pair_graph=_fill(fact_index.pair_graph, pairs, capacity.graphs - 1),
        fact_pair=_fill(fact_index.fact_pair, rows, pairs - 1),
        # Some sums add what follows the last offset to the last row. Counts of 0 add nothing.
        head_count=_fill(fact_index.head_count, rows, 0),
        tail_count=_fill(fact_index.tail_count, rows, 0),
    )


def _pad_graph(graph: PackedGraph, relations: tuple[int, int], capacity: Capacity) -> PackedGraph:
    last, nodes, facts = capacity.graphs - 1, capacity.nodes, capacity.facts
    groups = FactGroups(
        row=_fill(graph.groups.row, facts, capacity.merged_facts - 1),
        ptr=_pad_ptr(graph.groups.ptr, capacity.merged_facts),
        fact=_fill(graph.groups.fact, facts, facts - 1),
    )
    return PackedGraph(
        fact_index=_pad_fact_index(
            graph.fact_index, capacity.merged_facts, capacity.pairs, relations, capacity
        ),
        topic_facts=_pad_fact_index(
            graph.topic_facts, capacity.topic_facts, capacity.topic_pairs, relations, capacity
        ),
        groups=groups,
        topic_prob=_fill(graph.topic_prob, nodes, 0),
        topic_node=_fill(graph.topic_node, capacity.topics, nodes - 1),
        topic_graph=_fill(graph.topic_graph, capacity.topics, last),
        node_count=_fill(graph.node_count, nodes, 0),
        node_graph=_fill(graph.node_graph, nodes, last),
        fact_graph=_fill(graph.fact_graph, facts, last),
        node_ptr=_pad_ptr(graph.node_ptr, capacity.graphs),
        fact_ptr=_pad_ptr(graph.fact_ptr, capacity.graphs),
        label=_fill(graph.label, facts, 0),
        question_key=_fill(graph.question_key, capacity.graphs, 0),
        num_graphs=capacity.graphs,
        num_nodes=nodes,
        num_facts=facts,
        max_facts=capacity.max_facts,
    )


def pad_batch(batch: QuestionBatch, capacity: Capacity) -> QuestionBatch:
    """Pads a batch to exactly the sizes of `capacity`. The real entries come first, unchanged.

    `node_graph`, `pair_graph` and `fact_graph` put the added nodes, pairs and facts into the last
    graph. They lie after the last offset of `node_ptr`, `pair_ptr` and `fact_ptr`. The host
    integers are those of the capacity, so all batches of one capacity share them.

    Args:
        batch: a batch of phase 1, in host memory.
        capacity: any capacity that is at least `required_capacity(batch)`.

    Returns:
        A batch that shares no memory with `batch`.

    Raises:
        ValueError: the capacity is too small, or the batch has prompts.
    """
    needed = required_capacity(batch)
    if not capacity.holds(needed):
        raise ValueError(f"pad_batch: {capacity} does not hold a batch that needs {needed}")
    if not (batch.prefix is batch.facts is batch.target is None):
        raise ValueError("pad_batch: only batches without prompts (phase 1) can be padded")
    relations = batch.relation_row.shape[0]
    tokens, width = batch.relation_tokens, capacity.question_tokens
    states = batch.question_states
    padded_states = states.new_zeros(capacity.graphs, width, states.shape[2])
    padded_states[: states.shape[0], : states.shape[1]] = states
    mask = batch.question_mask.new_zeros(capacity.graphs, width)
    mask[: states.shape[0], : states.shape[1]] = batch.question_mask
    return replace(
        batch,
        graph=_pad_graph(batch.graph, (relations, capacity.relations - 1), capacity),
        question_states=padded_states,
        question_mask=mask,
        relation_row=_fill(batch.relation_row, capacity.relations, 0),
        relation_tokens=TokenPack(
            _fill(tokens.ids, capacity.relation_tokens, 0),
            _pad_token_ptr(tokens, capacity),
            capacity.relation_tokens,
        ),
    )


def with_padding(batch: QuestionBatch) -> QuestionBatch:
    """The batch with `padded` where one of its sizes is 0 or 1.

    torch.compile makes another graph for each size that is 0 or 1. All sizes of `padded` are at
    least 2.

    Args:
        batch: a batch in host memory, with at least one relation in its data set.
    """
    needed = required_capacity(batch)
    if min(needed) > 2:
        return batch
    plain = replace(batch, prefix=None, facts=None, target=None)
    return replace(batch, padded=pad_batch(plain, Capacity(*(max(size, 2) for size in needed))))


def _pad_token_ptr(tokens: TokenPack, capacity: Capacity) -> Tensor:
    """Extends the offsets of the relations' texts. The added texts share the added tokens."""
    # `attention_pool` requires offsets that cover every token. One text with all added tokens
    # would be its slowest row.
    num_texts, num_tokens = tokens.ptr.shape[0] - 1, tokens.ids.shape[0]
    added_texts = 2 * capacity.relations - num_texts
    added_tokens = capacity.relation_tokens - num_tokens
    ends = num_tokens + np.arange(1, added_texts + 1) * added_tokens // added_texts
    return torch.from_numpy(np.concatenate([tokens.ptr.numpy(), ends.astype(np.int32)]))
