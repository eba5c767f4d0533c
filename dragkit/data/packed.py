"""Types that carry a batch: many ragged graphs laid end to end, with no padding between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from dragkit_kernels import FactGroups, FactIndex


class _Movable:
    """Moves every tensor field of a frozen dataclass, nested ones included."""

    __slots__ = ()

    def _map(self, move: object) -> Self:
        changes = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changes[field.name] = move(value)  # type: ignore[operator]
            elif isinstance(value, _Movable):
                changes[field.name] = value._map(move)
            elif isinstance(value, FactIndex | FactGroups):
                changes[field.name] = type(value)(*(move(t) for t in value))  # type: ignore[operator]
        return replace(self, **changes)  # type: ignore[type-var]

    def tensors(self) -> list[Tensor]:
        """All tensors, in one order for all batches."""
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self._map(note)
        return found

    def with_tensors(self, tensors: Iterable[Tensor]) -> Self:
        """The same with other tensors, in the order of `tensors`."""
        following = iter(tensors)
        return self._map(lambda _: next(following))

    def to(self, device: torch.device | str) -> Self:
        """A copy on `device`. The copy does not block, so pinned memory overlaps with compute."""
        return self._map(lambda t: t.to(device, non_blocking=True))


@dataclass(frozen=True, slots=True)
class PackedGraph(_Movable):
    """B question subgraphs as one graph, whose nodes are classes of equal ones (see `merge_nodes`).

    E facts as the questions have them, N nodes and Q merged facts between them.

    Attributes:
        fact_index: the Q merged facts in three orders; rows of relations count in the pack's list.
        topic_facts: the merged facts that touch a topic, with their own pairs.
        groups: which of the E facts each merged one stands for.
        topic_prob: float32 [N] seed distribution: the share of one node of each class, uniform over
            a graph's topic nodes (over all nodes where it has none).
        topic_row: int32 [T] the nodes with a share; topic_graph: int32 [T] their graphs.
        node_count: int32 [N] how many nodes each stands for.
        node_graph, fact_graph: int32 [N], [E] graph of each node and fact.
        node_ptr, fact_ptr: int32 [B+1] first node and fact of each graph.
        label: float32 [E] 1 where the fact lies on a gold path.
        question_key: int64 [B] counter word of the question's noise, independent of the batch.
        num_graphs, num_nodes, num_facts, max_facts: host integers (max_facts of one graph).
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
class TokenPack(_Movable):
    """Ragged token rows: row i is `ids[ptr[i]:ptr[i+1]]`; int32 [T], int32 [rows+1]."""

    ids: Tensor
    ptr: Tensor
    max_row: int


@dataclass(frozen=True, slots=True)
class QuestionBatch(_Movable):
    """What one training or evaluation step needs.

    Attributes:
        graph: the packed subgraphs.
        question_states: float32 [B, T, D] cached token states of the questions, zero-padded.
        question_mask: bool [B, T] True at real tokens.
        relation_row: int64 [R] rows of the data set's relation table used by this pack.
        relation_tokens: their 2R texts, forward and inverse after each other, as rows of the
            table's token states.
        prefix, facts, target: token rows of B prompts' beginnings, E facts and B answers; None in
            phase 1.
        rows: the questions' indices in the store, in batch order (host).
        num_labelled: questions with a positive fact; a host integer.
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
