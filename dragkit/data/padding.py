"""Packs of a few fixed sizes: a batch with nodes, facts and the rest filled up to a capacity.

What is added belongs to one more graph, without labels, and no fact of it is on any node's or
pair's list, so that nothing of a real graph depends on it and no gradient comes from it.
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
    """The sizes of a batch on which shapes depend.

    `merged_facts` are the merged facts of `PackedGraph.fact_index`. `topic_facts` and `topic_pairs`
    are those of `PackedGraph.topic_facts`. `max_facts` counts the facts of one graph and
    chooses the kernels' tiles. `question_tokens` is the width of the questions' states.
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
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))


def required_capacity(batch: QuestionBatch) -> Capacity:
    """The least capacity of a batch: one more of everything, for the padding to point at."""
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
    """Capacities in one proportion, a factor of `BUCKET_GROWTH` apart.

    Rounding every size by itself would give nearly as many capacities as batches. The sizes of a
    data set's batches grow together, so one number, the level, sets them all.

    Args:
        samples: batches of the usual size; their largest sizes are level 0. What `capacity` says is
            a function of these and of the batch alone, never of batches seen before.

    Raises:
        ValueError: no samples.
    """

    def __init__(self, samples: Sequence[QuestionBatch]) -> None:
        if not samples:
            raise ValueError("Buckets: at least one batch is needed")
        needs = map(required_capacity, samples)
        self.usual = Capacity(*(max(sizes) for sizes in zip(*needs, strict=True)))

    def at_level(self, level: int) -> Capacity:
        """Capacity of a level, which may be negative."""
        return Capacity(*(math.ceil(size * BUCKET_GROWTH**level) for size in self.usual))

    def capacity(self, batch: QuestionBatch) -> Capacity:
        """The smallest capacity that holds the batch."""
        need, level = required_capacity(batch), 0
        while not self.at_level(level).holds(need):
            level += 1
        while self.at_level(level - 1).holds(need):
            level -= 1
        return self.at_level(level)


def _filled(tensor: Tensor, size: int, value: int) -> Tensor:
    """A copy with `size` rows, the added ones all `value`."""
    # By numpy: there are some forty of these in a batch, and its calls are the cheaper ones.
    given = tensor.numpy()
    out = np.empty(size, dtype=given.dtype)
    out[: len(given)] = given
    out[len(given) :] = value
    return torch.from_numpy(out)


def _spread(tensor: Tensor, size: int, first: int, last: int) -> Tensor:
    """A copy with `size` rows, of which the added ones ascend evenly from `first` to `last`."""
    given = tensor.numpy()
    added = size - len(given)
    steps = first + np.arange(added) * (last - first + 1) // max(added, 1)
    return torch.from_numpy(np.concatenate([given, steps.astype(given.dtype)]))


def _ptr(ptr: Tensor, segments: int) -> Tensor:
    """Offsets of `segments` segments, the added ones empty."""
    return _filled(ptr, segments + 1, ptr.numpy()[-1])


def _pad_fact_index(
    fact_index: FactIndex, rows: int, pairs: int, relation: tuple[int, int], capacity: Capacity
) -> FactIndex:
    """Facts without weight between the last node and itself; `relation` are the added relations."""
    node, fact = capacity.nodes - 1, rows - 1
    return FactIndex(
        head=_filled(fact_index.head, rows, node),
        tail=_filled(fact_index.tail, rows, node),
        tail_ptr=_ptr(fact_index.tail_ptr, capacity.nodes),
        tail_perm=_filled(fact_index.tail_perm, rows, fact),
        head_ptr=_ptr(fact_index.head_ptr, capacity.nodes),
        head_perm=_filled(fact_index.head_perm, rows, fact),
        pair_ptr=_ptr(fact_index.pair_ptr, pairs),
        pair_perm=_filled(fact_index.pair_perm, rows, fact),
        pair_relation=_spread(fact_index.pair_relation, pairs, *relation),
        pair_graph=_filled(fact_index.pair_graph, pairs, capacity.graphs - 1),
        fact_pair=_filled(fact_index.fact_pair, rows, pairs - 1),
        # Where a sum counts what lies after the last offset to the last row, zeros are harmless.
        head_count=_filled(fact_index.head_count, rows, 0),
        tail_count=_filled(fact_index.tail_count, rows, 0),
    )


def _graph(graph: PackedGraph, relation: tuple[int, int], capacity: Capacity) -> PackedGraph:
    last, nodes, facts = capacity.graphs - 1, capacity.nodes, capacity.facts
    groups = FactGroups(
        row=_filled(graph.groups.row, facts, capacity.merged_facts - 1),
        ptr=_ptr(graph.groups.ptr, capacity.merged_facts),
        fact=_filled(graph.groups.fact, facts, facts - 1),
    )
    return PackedGraph(
        fact_index=_pad_fact_index(
            graph.fact_index, capacity.merged_facts, capacity.pairs, relation, capacity
        ),
        topic_facts=_pad_fact_index(
            graph.topic_facts, capacity.topic_facts, capacity.topic_pairs, relation, capacity
        ),
        groups=groups,
        topic_prob=_filled(graph.topic_prob, nodes, 0),
        topic_node=_filled(graph.topic_node, capacity.topics, nodes - 1),
        topic_graph=_filled(graph.topic_graph, capacity.topics, last),
        node_count=_filled(graph.node_count, nodes, 0),
        node_graph=_filled(graph.node_graph, nodes, last),
        fact_graph=_filled(graph.fact_graph, facts, last),
        node_ptr=_ptr(graph.node_ptr, capacity.graphs),
        fact_ptr=_ptr(graph.fact_ptr, capacity.graphs),
        label=_filled(graph.label, facts, 0),
        question_key=_filled(graph.question_key, capacity.graphs, 0),
        num_graphs=capacity.graphs,
        num_nodes=nodes,
        num_facts=facts,
        max_facts=capacity.max_facts,
    )


def pad_batch(batch: QuestionBatch, capacity: Capacity) -> QuestionBatch:
    """A batch of exactly the sizes of `capacity`; what it had comes first and is unchanged.

    Added nodes, pairs and facts belong to the last graph by `node_graph`, `pair_graph` and
    `fact_graph`, but lie after the last offset of `node_ptr`, `pair_ptr` and `fact_ptr`. The host
    integers are those of the capacity, so that they are the same for all batches of it.

    Args:
        batch: of phase 1, in host memory; capacity: at least `required_capacity(batch)`.

    Returns:
        A batch that shares no memory with the given one.

    Raises:
        ValueError: the capacity is too small, or the batch has prompts.
    """
    need = required_capacity(batch)
    if not capacity.holds(need):
        raise ValueError(f"pad_batch: {capacity} does not hold a batch that needs {need}")
    if not (batch.prefix is batch.facts is batch.target is None):
        raise ValueError("pad_batch: a batch with prompts cannot be padded")
    relations = batch.relation_row.shape[0]
    tokens, width = batch.relation_tokens, capacity.question_tokens
    states = batch.question_states
    padded_states = states.new_zeros(capacity.graphs, width, states.shape[2])
    padded_states[: states.shape[0], : states.shape[1]] = states
    mask = batch.question_mask.new_zeros(capacity.graphs, width)
    mask[: states.shape[0], : states.shape[1]] = batch.question_mask
    return replace(
        batch,
        graph=_graph(batch.graph, (relations, capacity.relations - 1), capacity),
        question_states=padded_states,
        question_mask=mask,
        relation_row=_filled(batch.relation_row, capacity.relations, 0),
        relation_tokens=TokenPack(
            _filled(tokens.ids, capacity.relation_tokens, 0),
            _token_ptr(tokens, capacity),
            capacity.relation_tokens,
        ),
    )


def _token_ptr(tokens: TokenPack, capacity: Capacity) -> Tensor:
    """Offsets of all texts; unlike the other lists, those of the added ones share what is left.

    `attention_pool` takes offsets that cover every token, and one long text would keep it waiting.
    """
    texts, have = 2 * capacity.relations, tokens.ptr.shape[0] - 1
    left = capacity.relation_tokens - tokens.ids.shape[0]
    ends = tokens.ids.shape[0] + np.arange(1, texts - have + 1) * left // (texts - have)
    return torch.from_numpy(np.concatenate([tokens.ptr.numpy(), ends.astype(np.int32)]))
