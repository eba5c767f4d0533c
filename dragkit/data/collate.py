"""Rows of a packed store to one batch: blocks are copied with an offset, nothing is sorted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dragkit.data.packed import PackedGraph, QuestionBatch, TokenPack
from dragkit.data.packing import COUNTS, PER_FACT
from dragkit.data.store import PackedStore
from dragkit.data.tokens import TokenRows
from dragkit_kernels import FactGroups, FactIndex


class QuestionStates(Protocol):
    """Cached token states of the questions."""

    def rows(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """float32 [B, T, D] zero-padded states and bool [B, T] mask of some questions."""
        ...


class _Slices:
    """Some questions' items in the store, and where they go in the pack.

    Args:
        ptr: int64 [Q+1] first item of each question in the store; rows: int64 [B] questions.

    Attributes:
        count: [B] items of each; base: int32 [B+1] first in the pack; owner: int32 [total].
    """

    def __init__(self, ptr: np.ndarray, rows: np.ndarray) -> None:
        self.first = ptr[rows]
        self.count = ptr[rows + 1] - self.first
        self.base = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(self.count, out=self.base[1:])
        self.total = int(self.base[-1])

    @cached_property
    def owner(self) -> np.ndarray:
        """Place in the batch of every item's question."""
        return np.repeat(np.arange(len(self.count), dtype=np.int32), self.count)

    def join(
        self, blocks: np.ndarray, shift: Sequence[np.ndarray | None], skip: int = 0
    ) -> np.ndarray:
        """Each question's block [height, count] plus its offset in every row.

        Args:
            blocks: blocks of the store end to end, of `skip` rows and one per entry of `shift`.
            shift: [B+1] bases to add, None for none; skip: rows of a block to leave out.

        Returns:
            int32 [len(shift), total].
        """
        height = skip + len(shift)
        pieces = [
            blocks[(start := first * height) + skip * count : start + height * count].reshape(
                len(shift), count
            )
            for first, count in zip(self.first.tolist(), self.count.tolist(), strict=True)
        ]
        joined = np.concatenate(pieces, axis=1, dtype=np.int32)
        for row, base in zip(joined, shift, strict=True):
            if base is not None:
                row += base[self.owner]
        return joined


def _ptr(ends: np.ndarray) -> np.ndarray:
    """Offsets from segment ends."""
    return np.concatenate([np.zeros(1, dtype=np.int32), ends])


def _to_fact_index(fields: dict[str, np.ndarray]) -> FactIndex:
    return FactIndex(**{name: torch.from_numpy(value) for name, value in fields.items()})


class PackedCollator:
    """Makes a `QuestionBatch` of some questions of a store.

    Args:
        store: the packed questions; question_states: their cached token states.
        relation_mask: bool [relations, 2, W] real tokens of the relations' padded texts.
        tokens: prompt rows; None in phase 1.
    """

    def __init__(
        self,
        store: PackedStore,
        question_states: QuestionStates,
        relation_mask: Tensor,
        tokens: TokenRows | None = None,
    ) -> None:
        self.store = store
        self.question_states = question_states
        self.tokens = tokens
        self.relation_width = relation_mask.shape[2]
        self.relation_lengths = relation_mask.sum(2).numpy()

    def _relation_tokens(self, relation_row: np.ndarray) -> TokenPack:
        """Rows of the token states of some relations, [R]: without the padding."""
        length = self.relation_lengths[relation_row].ravel()
        ptr = np.zeros(len(length) + 1, dtype=np.int32)
        np.cumsum(length, out=ptr[1:])
        first = (2 * relation_row[:, None] + np.arange(2)).ravel() * self.relation_width
        ids = np.repeat(first - ptr[:-1], length) + np.arange(ptr[-1])
        longest = int(length.max(initial=0))
        return TokenPack(torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(ptr), longest)

    def graph(self, rows: Sequence[int]) -> tuple[PackedGraph, Tensor]:
        """The pack of some questions, and int64 [R] the data set's relations it uses, ascending."""
        store, index = self.store, np.asarray(rows, dtype=np.int64)
        fact, edge, node = (
            _Slices(getattr(store, f"{name}_ptr"), index) for name in ("fact", "edge", "class")
        )
        facts = fact.join(store.facts, [edge.base, fact.base], skip=2)
        nodes = node.join(store.classes, [edge.base, edge.base, None])
        edges, fact_index = self._index_fields("", index, node, edge, nodes, more=[fact.base])
        start_edge = _Slices(store.start_edge_ptr, index)
        ends = node.join(store.start_classes, [start_edge.base, start_edge.base])
        _, start = self._index_fields("start_", index, node, start_edge, ends, more=[])
        topic = _Slices(store.topic_class_ptr, index)
        topic_node = topic.join(store.topic_classes, [node.base])[0]
        size = nodes[2][topic_node]
        total = np.bincount(topic.owner, weights=size, minlength=len(index))
        share = np.zeros(node.total, dtype=np.float32)
        share[topic_node] = (1 / np.maximum(total, 1))[topic.owner]
        # Rows of the store ascend within a graph; so do their ranks in the sorted list.
        relation_row = np.unique(fact_index["pair_relation"])
        for part in (fact_index, start):
            rank = np.searchsorted(relation_row, part["pair_relation"])
            part["pair_relation"] = rank.astype(np.int32)
        groups = (facts[0], _ptr(edges[-1]), facts[1])
        graph = PackedGraph(
            fact_index=_to_fact_index(fact_index),
            topic_facts=_to_fact_index(start),
            groups=FactGroups(*map(torch.from_numpy, groups)),
            topic_prob=torch.from_numpy(share),
            topic_node=torch.from_numpy(topic_node),
            topic_graph=torch.from_numpy(topic.owner),
            node_count=torch.from_numpy(nodes[2]),
            node_graph=torch.from_numpy(node.owner),
            fact_graph=torch.from_numpy(fact.owner),
            node_ptr=torch.from_numpy(node.base),
            fact_ptr=torch.from_numpy(fact.base),
            label=torch.from_numpy(fact.join(store.labels, [None])[0].astype(np.float32)),
            question_key=torch.from_numpy(store.question_key[index]),
            num_graphs=len(index),
            num_nodes=node.total,
            num_facts=fact.total,
            max_facts=int(fact.count.max(initial=0)),
        )
        return graph, torch.from_numpy(relation_row.astype(np.int64))

    def _index_fields(
        self,
        prefix: str,
        index: np.ndarray,
        node: _Slices,
        edge: _Slices,
        ends: np.ndarray,
        more: list[np.ndarray],
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The joined block of merged facts, and the fields of `FactIndex` by name."""
        store = self.store
        pair = _Slices(getattr(store, f"{prefix}pair_ptr"), index)
        shift = {"head": node.base, "tail": node.base, "fact_pair": pair.base}
        offsets = [shift.get(name, edge.base) for name in PER_FACT]
        edges = edge.join(getattr(store, f"{prefix}edges"), [*offsets, None, None, *more])
        pairs = pair.join(getattr(store, f"{prefix}pairs"), [edge.base, None])
        fields = dict(zip((*PER_FACT, *COUNTS), edges, strict=False))
        fields |= {"tail_ptr": _ptr(ends[0]), "head_ptr": _ptr(ends[1]), "pair_ptr": _ptr(pairs[0])}
        return edges, fields | {"pair_relation": pairs[1], "pair_graph": pair.owner}

    def __call__(self, rows: Sequence[int]) -> QuestionBatch:
        """The batch of the questions `rows`, in their order.

        Raises:
            ValueError: no rows; IndexError: a row outside the store.
        """
        if len(rows) == 0:
            raise ValueError("a batch needs at least one question")
        rows = [int(row) for row in rows]
        if min(rows) < 0 or max(rows) >= len(self.store):
            raise IndexError(f"rows {min(rows)}..{max(rows)} of {len(self.store)} questions")
        graph, relation_row = self.graph(rows)
        states, mask = self.question_states.rows(rows)
        prefix = facts = target = None
        if self.tokens is not None:
            prefix, facts, target = self.tokens.packs(rows)
        return QuestionBatch(
            graph=graph,
            question_states=states,
            question_mask=mask,
            relation_row=relation_row,
            relation_tokens=self._relation_tokens(relation_row.numpy()),
            prefix=prefix,
            facts=facts,
            target=target,
            rows=tuple(rows),
            num_labelled=len(np.unique(graph.fact_graph.numpy()[graph.label.numpy() > 0.5])),
        )
