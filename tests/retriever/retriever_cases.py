"""Small random graphs, their packs, their relations, and a retriever in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dragkit.config import RetrieverConfig
from dragkit.data.node_merging import merge_nodes
from dragkit.data.packed import PackedGraph, QuestionBatch, RelationStates, TokenPack
from dragkit.retriever.retriever import Retriever
from dragkit_kernels import FactGroups, build_fact_index

TEXT, MAX_WORDS = 12, 4


def make_graph(rng, num_nodes, num_facts, num_relations, num_tokens=None):
    if num_tokens is None:
        num_tokens = int(rng.integers(1, 6))
    return {
        "head": rng.integers(0, max(num_nodes, 1), num_facts),
        "tail": rng.integers(0, max(num_nodes, 1), num_facts),
        "relation": rng.integers(0, num_relations, num_facts),
        "topics": sorted({int(t) for t in rng.integers(0, max(num_nodes, 1), 2)})
        if num_nodes
        else [],
        "num_nodes": num_nodes,
        "question": torch.tensor(rng.normal(size=(num_tokens, TEXT))),
    }


def text_lengths(num_relations):
    """Returns the number of tokens of every relation's two texts, 1 to MAX_WORDS."""
    return 1 + (torch.arange(2 * num_relations) * 7 % MAX_WORDS).view(num_relations, 2)


def as_int(values) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.int32)


def pack_graph(graphs, relation, dtype, merge) -> PackedGraph:
    num_graphs = len(graphs)
    node_ptr = np.cumsum([0] + [g["num_nodes"] for g in graphs])
    fact_ptr = np.cumsum([0] + [len(g["head"]) for g in graphs])
    head, tail = (
        np.concatenate([g[end] + start for g, start in zip(graphs, node_ptr, strict=False)])
        for end in ("head", "tail")
    )
    entity_graph = np.repeat(np.arange(num_graphs), np.diff(node_ptr))
    fact_graph = np.repeat(np.arange(num_graphs), np.diff(fact_ptr))
    topic = np.zeros(node_ptr[-1], dtype=bool)
    for g, start in zip(graphs, node_ptr, strict=False):
        topic[[start + t for t in g["topics"]]] = True
    merged = merge_nodes(head, tail, relation, entity_graph, topic, merge=merge)
    num_nodes, num_rows = len(merged.node_count), len(merged.head)
    node_graph, row_graph = np.zeros(num_nodes, np.int32), np.zeros(num_rows, np.int32)
    node_graph[merged.merged_node] = entity_graph
    row_graph[merged.merged_fact] = fact_graph
    topic_node = np.unique(merged.merged_node[topic])
    topic_prob = torch.zeros(num_nodes, dtype=dtype)
    for node in topic_node:
        topic_prob[node] = 1 / len(graphs[node_graph[node]]["topics"])

    def fact_index(chosen):
        head, tail, relation, *counts = (as_int(column[chosen]) for column in merged[3:])
        counts = dict(zip(("head_count", "tail_count"), counts, strict=True))
        graph = as_int(row_graph[chosen])
        return build_fact_index(head, tail, relation, num_nodes, graph, **counts)

    near_topic = np.isin(merged.head, topic_node) | np.isin(merged.tail, topic_node)
    ends = np.cumsum(np.bincount(merged.merged_fact, minlength=num_rows))
    return PackedGraph(
        fact_index=fact_index(np.arange(num_rows)),
        topic_facts=fact_index(np.flatnonzero(near_topic)),
        groups=FactGroups(
            as_int(merged.merged_fact),
            as_int([0, *ends]),
            as_int(np.argsort(merged.merged_fact, kind="stable")),
        ),
        topic_prob=topic_prob,
        topic_node=as_int(topic_node),
        topic_graph=as_int(node_graph[topic_node]),
        node_count=as_int(merged.node_count),
        node_graph=as_int(node_graph),
        fact_graph=as_int(fact_graph),
        node_ptr=as_int([0, *np.cumsum(np.bincount(node_graph, minlength=num_graphs))]),
        fact_ptr=as_int(fact_ptr),
        label=torch.zeros(int(fact_ptr[-1]), dtype=dtype),
        question_key=torch.arange(num_graphs),
        num_graphs=num_graphs,
        num_nodes=num_nodes,
        num_facts=int(fact_ptr[-1]),
        max_facts=int(np.diff(fact_ptr).max()),
    )


def pack(graphs, dtype=torch.float64, merge=True) -> QuestionBatch:
    used, relation = np.unique(np.concatenate([g["relation"] for g in graphs]), return_inverse=True)
    longest = max(len(g["question"]) for g in graphs)
    states = torch.zeros(len(graphs), longest, TEXT, dtype=dtype)
    mask = torch.zeros(len(graphs), longest, dtype=torch.bool)
    for i, g in enumerate(graphs):
        states[i, : len(g["question"])] = g["question"].to(dtype)
        mask[i, : len(g["question"])] = True
    all_lengths = text_lengths(int(max(used, default=0)) + 1).flatten()
    ends, texts = all_lengths.cumsum(0), [2 * r + d for r in used for d in (0, 1)]
    lengths, starts = all_lengths[texts].tolist(), (ends - all_lengths)[texts].tolist()
    rows = [start + t for start, n in zip(starts, lengths, strict=True) for t in range(n)]
    return QuestionBatch(
        graph=pack_graph(graphs, relation, dtype, merge),
        question_states=states,
        question_mask=mask,
        relation_row=torch.tensor(used, dtype=torch.int64),
        relation_tokens=TokenPack(as_int(rows), as_int([0, *np.cumsum(lengths)]), MAX_WORDS),
        prefix=None,
        facts=None,
        target=None,
        rows=tuple(range(len(graphs))),
        num_labelled=0,
    )


def relation_states(num_relations, dtype=torch.float64) -> RelationStates:
    generator = torch.Generator().manual_seed(5)
    ends = text_lengths(num_relations).flatten().cumsum(0)
    states = torch.randn(int(ends[-1]), TEXT, generator=generator, dtype=dtype)
    return RelationStates(states, torch.cat([torch.zeros(1, dtype=torch.int64), ends]))


def double_retriever(**settings) -> Retriever:
    torch.manual_seed(1)
    config = RetrieverConfig(hidden_dim=8, dropout=0.0, num_reasoning_steps=2, **settings)
    return Retriever(config, TEXT).double()
