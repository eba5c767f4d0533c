"""Packs of random and of real graphs, on which the op benchmarks run.

Unlike in training, equal facts are not merged, so every contender visits every fact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import Data

from dragkit_kernels import FactIndex
from dragkit_kernels.testing import Adjacency, adjacency, random_adjacency


class Shape(NamedTuple):
    """Number of graphs, nodes and facts of each, and relations that all of them draw from."""

    name: str
    graphs: int
    nodes: int
    facts: int
    relations: int


# Small questions, large WebQSP and CWQ ones, and a million facts.
SHAPES = (
    Shape("S", 16, 30, 50, 17),
    Shape("W", 16, 1_430, 4_250, 150),
    Shape("C", 64, 2_000, 5_000, 150),
    Shape("M", 64, 6_250, 15_625, 150),
)
# Shapes for two cores. The last one has whole graphs of C, because the number of nodes per pair of
# graph and relation determines how much work the collapsed form saves.
CPU_SHAPES = (
    SHAPES[0],
    Shape("C, reduced", 4, 800, 2_000, 150),
    Shape("C, 2 graphs", 2, 2_000, 5_000, 150),
)


class Pack(NamedTuple):
    """Concatenated graphs, with the int64 indices that other libraries need.

    Attributes:
        name: as printed.
        fact_index: the facts in graph order, with all counts one.
        edge_index: int64 [2, E].
        pair, relation, fact_graph: int64 [E].
        node_graph: int64 [N].
        node_ptr, fact_ptr: int32 [B+1].
        num_relations: R.
        max_facts: of one graph.
    """

    name: str
    fact_index: FactIndex
    edge_index: Tensor
    pair: Tensor
    relation: Tensor
    fact_graph: Tensor
    node_graph: Tensor
    node_ptr: Tensor
    fact_ptr: Tensor
    num_relations: int
    max_facts: int

    @property
    def num_graphs(self) -> int:
        """B."""
        return self.node_ptr.shape[0] - 1

    @property
    def device(self) -> torch.device:
        """Of all tensors."""
        return self.node_ptr.device

    def sizes(self) -> dict[str, object]:
        """The sizes, for the tables."""
        return {
            "graphs": self.num_graphs,
            "nodes": self.fact_index.num_nodes,
            "facts": self.fact_index.num_facts,
            "relations": self.num_relations,
            "pairs": self.fact_index.num_pairs,
        }


def _pack(name: str, graphs: Adjacency, num_relations: int, device: torch.device) -> Pack:
    ones = torch.ones_like(graphs.fact_index.head)
    fact_index = graphs.fact_index._replace(head_count=ones, tail_count=ones)
    fact_index = FactIndex(*(tensor.to(device) for tensor in fact_index))
    return Pack(
        name=name,
        fact_index=fact_index,
        edge_index=torch.stack([fact_index.head, fact_index.tail]).long(),
        pair=fact_index.fact_pair.long(),
        relation=graphs.relation.to(device),
        fact_graph=graphs.fact_graph.long().to(device),
        node_graph=graphs.node_graph.long().to(device),
        node_ptr=graphs.node_ptr.to(device),
        fact_ptr=graphs.fact_ptr.to(device),
        num_relations=num_relations,
        max_facts=int(graphs.fact_ptr.diff().max()),
    )


def random_pack(shape: Shape, device: torch.device) -> Pack:
    """Random graphs with hubs: one fact in sqrt(N), on average, ends in the graph's first node."""
    graphs = random_adjacency([(shape.nodes, shape.facts)] * shape.graphs, shape.relations)
    return _pack(shape.name, graphs, shape.relations, device)


def real_pack(name: str, questions: Sequence[Data], device: torch.device) -> Pack:
    """The graphs of real questions. The relations that occur are numbered from 0."""
    sizes = [(q.num_nodes, q.edge_index.shape[1]) for q in questions]
    node_ptr = torch.tensor([0, *(nodes for nodes, _ in sizes)]).cumsum(0)
    index = torch.cat([q.edge_index + node_ptr[i] for i, q in enumerate(questions)], dim=1)
    types, relation = torch.unique(torch.cat([q.edge_type for q in questions]), return_inverse=True)
    graphs = adjacency(sizes, index[0], index[1], relation)
    return _pack(name, graphs, len(types), device)
