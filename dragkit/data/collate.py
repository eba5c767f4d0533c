"""Collates rows of a packed store into a batch: copies blocks, adds offsets, sorts nothing."""

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
        """Returns zero-padded states, float32 [B, T, D], and their mask, bool [B, T]."""
        ...


class _Slices:
    """Positions of the items of some questions, in the store and in the pack.

    Args:
        ptr: int64 [Q+1] first item of each question in the store.
        rows: int64 [B] questions.

    Attributes:
        start: int64 [B] first item of each question in the store.
        count: int64 [B] items of each question.
        ptr: int32 [B+1] first item of each question in the pack.
        total: number of items in the pack.
    """

    def __init__(self, ptr: np.ndarray, rows: np.ndarray) -> None:
        self.start = ptr[rows]
        self.count = ptr[rows + 1] - self.start
        self.ptr = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(self.count, out=self.ptr[1:])
        self.total = int(self.ptr[-1])

    @cached_property
    def graph(self) -> np.ndarray:
        """int32 [total] position in the batch of each item's question."""
        return np.repeat(np.arange(len(self.count), dtype=np.int32), self.count)

    def gather(
        self, blocks: np.ndarray, offsets: Sequence[np.ndarray | None], skip: int = 0
    ) -> np.ndarray:
        """Joins the questions' blocks [height, count] and adds each question's offset to each row.

        Args:
            blocks: blocks of the whole store end to end. Their height is `skip` + `len(offsets)`.
            offsets: for each row the offsets of all questions, [B+1], or None to add nothing.
            skip: number of first rows to leave out.

        Returns:
            int32 [len(offsets), total].
        """
        height = skip + len(offsets)
        pieces = [
            blocks[(begin := start * height) + skip * count : begin + height * count].reshape(
                len(offsets), count
            )
            for start, count in zip(self.start.tolist(), self.count.tolist(), strict=True)
        ]
        joined = np.concatenate(pieces, axis=1, dtype=np.int32)
        for row, offset in zip(joined, offsets, strict=True):
            if offset is not None:
                row += offset[self.graph]
        return joined


def _ends_to_ptr(ends: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, dtype=np.int32), ends])


def _to_fact_index(fields: dict[str, np.ndarray]) -> FactIndex:
    return FactIndex(**{name: torch.from_numpy(value) for name, value in fields.items()})


class PackedCollator:
    """Makes a `QuestionBatch` of some questions of a store.

    Args:
        store: the packed questions.
        question_states: their cached token states.
        relation_ptr: int64 [2 relations + 1], see `RelationStates`.
        tokens: token rows of the prompts, None in phase 1.
        labels: uint8 [E] labels in place of the store's.
    """

    def __init__(
        self,
        store: PackedStore,
        question_states: QuestionStates,
        relation_ptr: Tensor,
        tokens: TokenRows | None = None,
        labels: np.ndarray | None = None,
    ) -> None:
        self.store = store
        self.question_states = question_states
        self.tokens = tokens
        self.labels = labels
        self.relation_ptr = relation_ptr.numpy()

    def _relation_tokens(self, relation_row: np.ndarray) -> TokenPack:
        """Returns the rows of the token states of the relations [R], two texts for each."""
        texts = (2 * relation_row[:, None] + np.arange(2)).ravel()
        first = self.relation_ptr[texts]
        length = self.relation_ptr[texts + 1] - first
        ptr = np.zeros(len(length) + 1, dtype=np.int32)
        np.cumsum(length, out=ptr[1:])
        ids = np.repeat(first - ptr[:-1], length) + np.arange(ptr[-1])
        longest = int(length.max(initial=0))
        return TokenPack(torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(ptr), longest)

    def graph(self, rows: Sequence[int]) -> tuple[PackedGraph, Tensor]:
        """Packs the graphs of some questions.

        Returns:
            The pack, and int64 [R] the data set's relations in it, ascending.
        """
        store, index = self.store, np.asarray(rows, dtype=np.int64)
        node = _Slices(store.merged_node_ptr, index)
        fact = _Slices(store.fact_ptr, index)
        merged_fact = _Slices(store.merged_fact_ptr, index)
        topic_fact = _Slices(store.topic_fact_ptr, index)
        merged_row, by_merged = fact.gather(store.facts, [merged_fact.ptr, fact.ptr], skip=2)
        *ends, node_count = node.gather(
            store.merged_segments, [merged_fact.ptr, merged_fact.ptr, None]
        )
        fact_index, member_ends = self._index_fields(
            "merged", index, node, merged_fact, ends, more=[fact.ptr]
        )
        ends = node.gather(store.topic_segments, [topic_fact.ptr, topic_fact.ptr])
        topic_facts, _ = self._index_fields("topic", index, node, topic_fact, ends, more=[])
        topic_node, topic_graph, topic_prob = self._topics(index, node, node_count)
        # Relations ascend within each graph. Replacing them by ranks keeps that order.
        relation_row = np.unique(fact_index["pair_relation"])
        for fields in (fact_index, topic_facts):
            rank = np.searchsorted(relation_row, fields["pair_relation"])
            fields["pair_relation"] = rank.astype(np.int32)
        groups = (merged_row, _ends_to_ptr(member_ends[0]), by_merged)
        # The store's labels are not copied to loader processes, which map them again.
        labels = store.labels if self.labels is None else self.labels
        label = fact.gather(labels, [None])[0].astype(np.float32)
        graph = PackedGraph(
            fact_index=_to_fact_index(fact_index),
            topic_facts=_to_fact_index(topic_facts),
            groups=FactGroups(*map(torch.from_numpy, groups)),
            topic_prob=torch.from_numpy(topic_prob),
            topic_node=torch.from_numpy(topic_node),
            topic_graph=torch.from_numpy(topic_graph),
            node_count=torch.from_numpy(node_count),
            node_graph=torch.from_numpy(node.graph),
            fact_graph=torch.from_numpy(fact.graph),
            node_ptr=torch.from_numpy(node.ptr),
            fact_ptr=torch.from_numpy(fact.ptr),
            label=torch.from_numpy(label),
            question_key=torch.from_numpy(store.question_key[index]),
            num_graphs=len(index),
            num_nodes=node.total,
            num_facts=fact.total,
            max_facts=int(fact.count.max(initial=0)),
        )
        return graph, torch.from_numpy(relation_row.astype(np.int64))

    def _topics(
        self, index: np.ndarray, node: _Slices, node_count: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the topic nodes, their graphs, and the initial probability of all nodes."""
        topic = _Slices(self.store.topic_node_ptr, index)
        topic_node = topic.gather(self.store.topic_nodes, [node.ptr])[0]
        # A merged node counts as often as it has members. Its entry is the share of one member.
        total = np.bincount(topic.graph, weights=node_count[topic_node], minlength=len(index))
        topic_prob = np.zeros(node.total, dtype=np.float32)
        topic_prob[topic_node] = (1 / np.maximum(total, 1))[topic.graph]
        return topic_node, topic.graph, topic_prob

    def _index_fields(
        self,
        prefix: str,
        index: np.ndarray,
        node: _Slices,
        fact: _Slices,
        node_ends: Sequence[np.ndarray],
        more: list[np.ndarray],
    ) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
        """Returns the fields of a `FactIndex` by name, and the rows with the offsets `more`."""
        pair = _Slices(getattr(self.store, f"{prefix}_pair_ptr"), index)
        starts = {"head": node.ptr, "tail": node.ptr, "fact_pair": pair.ptr}
        offsets = [starts.get(name, fact.ptr) for name in PER_FACT]
        columns = fact.gather(
            getattr(self.store, f"{prefix}_facts"), [*offsets, *[None] * len(COUNTS), *more]
        )
        pair_ends, pair_relation = pair.gather(
            getattr(self.store, f"{prefix}_pairs"), [fact.ptr, None]
        )
        names = (*PER_FACT, *COUNTS)
        fields = dict(zip(names, columns, strict=False)) | {
            "tail_ptr": _ends_to_ptr(node_ends[0]),
            "head_ptr": _ends_to_ptr(node_ends[1]),
            "pair_ptr": _ends_to_ptr(pair_ends),
            "pair_relation": pair_relation,
            "pair_graph": pair.graph,
        }
        return fields, [*columns[len(names) :]]

    def __call__(self, rows: Sequence[int]) -> QuestionBatch:
        """Collates the questions `rows` in their order.

        Raises:
            ValueError: `rows` is empty.
            IndexError: a row is outside the store.
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
