"""Small random graphs, their packs and relations, and a retriever for them."""

from __future__ import annotations

import numpy as np
import torch
import torch.fx.experimental._config

from dragkit.config import RetrieverConfig
from dragkit.data.node_merging import merge_nodes
from dragkit.data.packed import PackedGraph, QuestionBatch, TokenPack
from dragkit.retriever.retriever import Retriever
from dragkit.retriever.text_encoder import RelationStates
from dragkit_kernels import FactGroups, build_fact_index

TEXT = 12


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


WORDS = 4


def lengths(num_relations):
    """Tokens of every relation's two texts, 1 to WORDS."""
    return 1 + (torch.arange(2 * num_relations) * 7 % WORDS).view(num_relations, 2)


def pack(graphs, dtype=torch.float64, merge=True) -> QuestionBatch:
    nodes = np.cumsum([0] + [g["num_nodes"] for g in graphs])
    facts = np.cumsum([0] + [len(g["head"]) for g in graphs])
    head = np.concatenate([g["head"] + o for g, o in zip(graphs, nodes, strict=False)])
    tail = np.concatenate([g["tail"] + o for g, o in zip(graphs, nodes, strict=False)])
    used, relation = np.unique(np.concatenate([g["relation"] for g in graphs]), return_inverse=True)
    owner = np.repeat(np.arange(len(graphs)), np.diff(nodes))
    mark = np.zeros(nodes[-1], dtype=bool)
    for g, o in zip(graphs, nodes, strict=False):
        mark[[o + t for t in g["topics"]]] = True
    merged = merge_nodes(head, tail, relation, owner, mark, merge=merge)
    num_nodes, num_rows = len(merged.node_count), len(merged.head)
    node_graph, row_graph = np.zeros(num_nodes, np.int32), np.zeros(num_rows, np.int32)
    node_graph[merged.merged_node] = owner
    row_graph[merged.merged_fact] = np.repeat(np.arange(len(graphs)), np.diff(facts))
    topic_node = np.unique(merged.merged_node[mark])
    topic = torch.zeros(num_nodes, dtype=dtype)
    for row in topic_node:
        topic[row] = 1 / len(graphs[node_graph[row]]["topics"])
    as_int = lambda a: torch.tensor(np.asarray(a), dtype=torch.int32)  # noqa: E731

    def fact_index(chosen):
        head, tail, relation, *counts = (as_int(column[chosen]) for column in merged[3:])
        counts = dict(zip(("head_count", "tail_count"), counts, strict=True))
        graph = as_int(row_graph[chosen])
        return build_fact_index(head, tail, relation, num_nodes, graph, **counts)

    near = np.isin(merged.head, topic_node) | np.isin(merged.tail, topic_node)
    ends = np.cumsum(np.bincount(merged.merged_fact, minlength=num_rows))
    longest = max(len(g["question"]) for g in graphs)
    states = torch.zeros(len(graphs), longest, TEXT, dtype=dtype)
    mask = torch.zeros(len(graphs), longest, dtype=torch.bool)
    for i, g in enumerate(graphs):
        states[i, : len(g["question"])] = g["question"].to(dtype)
        mask[i, : len(g["question"])] = True
    graph = PackedGraph(
        fact_index=fact_index(np.arange(num_rows)),
        topic_facts=fact_index(np.flatnonzero(near)),
        groups=FactGroups(
            as_int(merged.merged_fact),
            as_int([0, *ends]),
            as_int(np.argsort(merged.merged_fact, kind="stable")),
        ),
        topic_prob=topic,
        topic_node=as_int(topic_node),
        topic_graph=as_int(node_graph[topic_node]),
        node_count=as_int(merged.node_count),
        node_graph=as_int(node_graph),
        fact_graph=as_int(np.repeat(np.arange(len(graphs)), np.diff(facts))),
        node_ptr=as_int([0, *np.cumsum(np.bincount(node_graph, minlength=len(graphs)))]),
        fact_ptr=as_int(facts),
        label=torch.zeros(int(facts[-1]), dtype=dtype),
        question_key=torch.arange(len(graphs)),
        num_graphs=len(graphs),
        num_nodes=num_nodes,
        num_facts=int(facts[-1]),
        max_facts=int(np.diff(facts).max()),
    )
    words = lengths(int(max(used, default=0)) + 1)[used].flatten().tolist()
    firsts = [(2 * r + d) * WORDS for r in used for d in (0, 1)]
    rows = [first + t for first, n in zip(firsts, words, strict=True) for t in range(n)]
    return QuestionBatch(
        graph,
        states,
        mask,
        torch.tensor(used, dtype=torch.int64),
        TokenPack(as_int(rows), as_int([0, *np.cumsum(words)]), WORDS),
        None,
        None,
        None,
        tuple(range(len(graphs))),
        num_labelled=0,
    )


def relation_states(num_relations, dtype=torch.float64) -> RelationStates:
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(num_relations, 2, WORDS, TEXT, generator=generator, dtype=dtype)
    mask = torch.arange(WORDS) < lengths(num_relations).unsqueeze(2)
    return RelationStates(states * mask[..., None], mask)


def double_retriever(**settings) -> Retriever:
    torch.manual_seed(1)
    config = RetrieverConfig(hidden_dim=8, dropout=0.0, num_reasoning_steps=2, **settings)
    return Retriever(config, TEXT).double()
