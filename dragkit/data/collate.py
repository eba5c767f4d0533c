"""Rows of a packed store to one batch: blocks are copied with an offset, nothing is sorted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dragkit.data.packed import PackedGraph, QuestionBatch
from dragkit.data.store import PackedStore
from dragkit.data.tokens import TokenRows
from dragkit_kernels import FactOrders


class QuestionStates(Protocol):
    """Cached token states of the questions."""

    def rows(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """float32 [B, T, D] zero-padded states and bool [B, T] mask of some questions."""
        ...


def _offsets(ptr: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First item in the store [B], number of items [B], and first item in the pack [B+1]."""
    first = ptr[rows]
    count = ptr[rows + 1] - first
    base = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum(count, out=base[1:])
    return first, count, base


def _join(blocks: np.ndarray, first: np.ndarray, base: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """int32 [K, total]: each question's [K, count] block plus its own column of `shift` [K, B]."""
    height = len(shift)
    joined = np.empty((height, base[-1]), dtype=np.int32)
    ends = base.tolist()
    starts = (first * height).tolist()
    for graph, start in enumerate(starts):
        left, right = ends[graph], ends[graph + 1]
        block = blocks[start : start + height * (right - left)].reshape(height, right - left)
        np.add(block, shift[:, graph : graph + 1], out=joined[:, left:right])
    return joined


class PackedCollator:
    """Makes a `QuestionBatch` of some questions of a store.

    Args:
        store: the packed questions; question_states: their cached token states.
        tokens: prompt rows; None in phase 1.
    """

    def __init__(
        self, store: PackedStore, question_states: QuestionStates, tokens: TokenRows | None = None
    ) -> None:
        self.store = store
        self.question_states = question_states
        self.tokens = tokens

    def graph(self, rows: Sequence[int]) -> tuple[PackedGraph, Tensor]:
        """The pack of some questions, and int64 [R] the data set's relations it uses, ascending."""
        store, index = self.store, np.asarray(rows, dtype=np.int64)
        fact_first, fact_count, fact_base = _offsets(store.fact_ptr, index)
        node_first, node_count, node_base = _offsets(store.node_ptr, index)
        pair_first, pair_count, pair_base = _offsets(store.pair_ptr, index)
        f, n, p = fact_base[:-1], node_base[:-1], pair_base[:-1]
        facts = _join(store.facts, fact_first, fact_base, np.stack([n, n, f, f, f, p]))
        nodes = _join(store.nodes, node_first, node_base, np.stack([f, f]))
        pairs = _join(store.pairs, pair_first, pair_base, np.stack([f, np.zeros_like(f)]))
        # Rows of the store ascend within a graph; so do their ranks in the sorted list.
        relation_row = np.unique(pairs[1])
        pair_relation = np.searchsorted(relation_row, pairs[1]).astype(np.int32)
        graphs = np.arange(len(index), dtype=np.int32)

        def ptr(ends: np.ndarray) -> Tensor:
            return torch.from_numpy(np.concatenate([np.zeros(1, dtype=np.int32), ends]))

        head, tail, tail_fact, head_fact, pair_fact, fact_pair = torch.from_numpy(facts)
        orders = FactOrders(
            head=head,
            tail=tail,
            tail_ptr=ptr(nodes[0]),
            tail_fact=tail_fact,
            head_ptr=ptr(nodes[1]),
            head_fact=head_fact,
            pair_ptr=ptr(pairs[0]),
            pair_fact=pair_fact,
            pair_relation=torch.from_numpy(pair_relation),
            pair_graph=torch.from_numpy(np.repeat(graphs, pair_count)),
            fact_pair=fact_pair,
        )
        graph = PackedGraph(
            orders=orders,
            relation=torch.from_numpy(pair_relation[facts[5]]),
            topic=torch.from_numpy(self._topic(index, node_base)),
            node_graph=torch.from_numpy(np.repeat(graphs, node_count)),
            fact_graph=torch.from_numpy(np.repeat(graphs, fact_count)),
            node_ptr=torch.from_numpy(node_base),
            fact_ptr=torch.from_numpy(fact_base),
            label=torch.from_numpy(self._label(fact_first, fact_base)),
            question_key=torch.from_numpy(store.question_key[index]),
            num_graphs=len(index),
            num_nodes=int(node_base[-1]),
            num_facts=int(fact_base[-1]),
            max_facts=int(fact_count.max(initial=0)),
        )
        return graph, torch.from_numpy(relation_row.astype(np.int64))

    def _label(self, first: np.ndarray, base: np.ndarray) -> np.ndarray:
        label = np.empty(base[-1], dtype=np.float32)
        ends = base.tolist()
        for graph, start in enumerate(first.tolist()):
            left, right = ends[graph], ends[graph + 1]
            label[left:right] = self.store.labels[start : start + right - left]
        return label

    def _topic(self, index: np.ndarray, node_base: np.ndarray) -> np.ndarray:
        """float32 [N]: uniform over a graph's topic nodes; over all nodes where it has none."""
        topic = np.zeros(node_base[-1], dtype=np.float32)
        ends, ptr = node_base.tolist(), self.store.topic_node_ptr
        for graph, row in enumerate(index.tolist()):
            left, right = ends[graph], ends[graph + 1]
            rows = self.store.topic_nodes[ptr[row] : ptr[row + 1]]
            if len(rows):
                topic[left:right][rows] = 1 / len(rows)
            elif right > left:
                topic[left:right] = 1 / (right - left)
        return topic

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
            prefix=prefix,
            facts=facts,
            target=target,
            rows=tuple(rows),
        )
