"""Types of a batch: many ragged graphs laid end to end, without padding between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from dragkit_kernels import FactGroups, FactIndex


class _TensorFields:
    """Operations on every tensor field of a frozen dataclass, nested fields included."""

    __slots__ = ()

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        changes: dict[str, object] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changes[field.name] = function(value)
            elif isinstance(value, _TensorFields):
                changes[field.name] = value._map(function)
            elif isinstance(value, FactIndex | FactGroups):
                changes[field.name] = type(value)(*map(function, value))
        return replace(self, **changes)  # type: ignore[type-var]

    def tensors(self) -> list[Tensor]:
        """Returns all tensors in the order of the fields."""
        tensors: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        self._map(collect)
        return tensors

    def with_tensors(self, tensors: Iterable[Tensor]) -> Self:
        """Returns a copy with other tensors, given in the order of `tensors()`."""
        remaining = iter(tensors)
        return self._map(lambda _: next(remaining))

    def to(self, device: torch.device | str) -> Self:
        """Returns a copy on `device`. Copies from pinned memory do not block the host."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True, slots=True)
class PackedGraph(_TensorFields):
    """B question graphs as one graph, whose N nodes are merged nodes (see `merge_nodes`).

    The questions have E facts, which the graph holds as Q merged facts.

    Attributes:
        fact_index: the Q merged facts. `pair_relation` holds ranks in `QuestionBatch.relation_row`.
        topic_facts: the merged facts that touch a topic node, with their own pairs.
        groups: which of the E facts each merged fact stands for.
        topic_prob: float32 [N] initial probability p of one member of each node. It is uniform over
            the topic nodes of a graph, or over all nodes where the graph has no topic.
        topic_node: int32 [T] the nodes whose `topic_prob` is not 0.
        topic_graph: int32 [T] graph of each of them.
        node_count: int32 [N] nodes that each node stands for.
        node_graph: int32 [N] graph of each node.
        fact_graph: int32 [E] graph of each fact.
        node_ptr, fact_ptr: int32 [B+1] first node and fact of each graph.
        label: float32 [E] 1 for a positive fact, else 0.
        question_key: int64 [B] counter word of the question's noise, independent of the batch.
        num_graphs, num_nodes, num_facts: B, N and E, host integers.
        max_facts: maximum number of facts of one graph, a host integer.
    """

    fact_index: FactIndex
    topic_facts: FactIndex
    groups: FactGroups
    topic_prob: Tensor
    topic_node: Tensor
    topic_graph: Tensor
    node_count: Tensor
    node_graph: Tensor
    fact_graph: Tensor
    node_ptr: Tensor
    fact_ptr: Tensor
    label: Tensor
    question_key: Tensor
    num_graphs: int
    num_nodes: int
    num_facts: int
    max_facts: int


@dataclass(frozen=True, slots=True)
class TokenPack(_TensorFields):
    """Ragged token rows: row i is `ids[ptr[i]:ptr[i+1]]`.

    Attributes:
        ids: int32 [T].
        ptr: int32 [rows+1].
        max_row: number of tokens of the longest row, a host integer.
    """

    ids: Tensor
    ptr: Tensor
    max_row: int


@dataclass(frozen=True, slots=True)
class RelationStates(_TensorFields):
    """Token states of a data set's relations. Relation r has two texts, 2r forward, 2r+1 inverse.

    Attributes:
        states: float [T, D] token states of all texts end to end.
        ptr: int64 [2 relations + 1] first token of each text.
    """

    states: Tensor
    ptr: Tensor


@dataclass(frozen=True, slots=True)
class QuestionBatch(_TensorFields):
    """Input of one training or evaluation step.

    Attributes:
        graph: the packed graphs.
        question_states: float32 [B, T, D] cached token states of the questions, zero-padded.
        question_mask: bool [B, T] True at real tokens.
        relation_row: int64 [R] the data set's relations that occur in this pack, ascending.
        relation_tokens: rows of `RelationStates.states`. The relation at place i of `relation_row`
            has two texts: 2i is read forward and 2i+1 inverse.
        prefix, facts, target: token rows of B prompt prefixes, E facts and B targets. None in
            phase 1.
        rows: the questions' rows in the store, in batch order (host).
        num_labelled: number of questions with a positive fact, a host integer.
        padded: what a compiled retriever reads instead, see `with_padding`. None is the batch.
    """

    graph: PackedGraph
    question_states: Tensor
    question_mask: Tensor
    relation_row: Tensor
    relation_tokens: TokenPack
    prefix: TokenPack | None
    facts: TokenPack | None
    target: TokenPack | None
    rows: tuple[int, ...]
    num_labelled: int
    padded: QuestionBatch | None = None
