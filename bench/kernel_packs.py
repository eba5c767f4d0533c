"""What the kernel benchmarks run on: packs of random and of real graphs, for us and for PyG.

Facts are not merged here, unlike in training: every way visits every fact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from bench.pyg_rearev import pyg_batch, pyg_question
from dragkit.data.packed import PackedGraph, QuestionBatch, TokenPack
from dragkit.retriever.text_encoder import RelationStates
from dragkit_kernels import FactGroups, FactOrders, build_fact_orders
from dragkit_kernels.testing import Adjacency, adjacency, random_adjacency

_WORDS, _TEXT = 8, 384


class Shape(NamedTuple):
    """Equal graphs: nodes and facts of each, and the relations that all of them draw from."""

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
# What two cores get through. The last has whole graphs of C: how many nodes there are to a pair of
# graph and relation decides by how much the collapsed form is less work.
CPU_SHAPES = (
    SHAPES[0],
    Shape("C, reduced", 4, 800, 2_000, 150),
    Shape("C, 2 graphs", 2, 2_000, 5_000, 150),
)


class Pack(NamedTuple):
    """Graphs end to end, with the int64 indices that other libraries ask for.

    Attributes:
        name: as printed; orders: the facts, in graph order, all counts one.
        edge_index: int64 [2, E]; pair, relation, fact_graph: int64 [E]; node_graph: int64 [N].
        node_ptr, fact_ptr: int32 [B+1].
        num_relations: R; max_facts: of one graph.
    """

    name: str
    orders: FactOrders
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
        """Where all of it lies."""
        return self.node_ptr.device

    def sizes(self) -> dict[str, object]:
        """For the tables."""
        orders = self.orders
        return {
            "graphs": self.num_graphs,
            "nodes": orders.num_nodes,
            "facts": orders.num_facts,
            "relations": self.num_relations,
            "pairs": orders.num_pairs,
        }


def _pack(name: str, graphs: Adjacency, num_relations: int, device: torch.device) -> Pack:
    ones = torch.ones_like(graphs.orders.head)
    orders = graphs.orders._replace(head_count=ones, tail_count=ones)
    orders = FactOrders(*(tensor.to(device) for tensor in orders))
    return Pack(
        name=name,
        orders=orders,
        edge_index=torch.stack([orders.head, orders.tail]).long(),
        pair=orders.fact_pair.long(),
        relation=graphs.relation.to(device),
        fact_graph=graphs.fact_graph.long().to(device),
        node_graph=graphs.node_graph.long().to(device),
        node_ptr=graphs.node_ptr.to(device),
        fact_ptr=graphs.fact_ptr.to(device),
        num_relations=num_relations,
        max_facts=int(graphs.fact_ptr.diff().max()),
    )


def random_pack(shape: Shape, device: torch.device) -> Pack:
    """Random graphs with hubs: about one fact in the square root of N ends in a graph's first."""
    graphs = random_adjacency([(shape.nodes, shape.facts)] * shape.graphs, shape.relations)
    return _pack(shape.name, graphs, shape.relations, device)


def real_pack(name: str, questions: Sequence[Data], device: torch.device) -> Pack:
    """The graphs of real questions; relations are counted anew."""
    sizes = [(q.num_nodes, q.edge_index.shape[1]) for q in questions]
    first = torch.tensor([0, *(nodes for nodes, _ in sizes)]).cumsum(0)
    index = torch.cat([q.edge_index + first[i] for i, q in enumerate(questions)], dim=1)
    used, relation = torch.unique(torch.cat([q.edge_type for q in questions]), return_inverse=True)
    graphs = adjacency(sizes, index[0], index[1], relation)
    return _pack(name, graphs, len(used), device)


class Questions(NamedTuple):
    """The same random questions over a pack's graphs, as our batch and as PyG's."""

    ours: QuestionBatch
    pyg: Batch
    relations: RelationStates


def _int(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int32)


def random_questions(pack: Pack) -> Questions:
    """Two topics, one gold fact in 25 and 4 to 12 tokens for each graph; all texts are noise.

    Graphs need a node and a fact.
    """
    generator = torch.Generator().manual_seed(1)
    device, orders = pack.device, FactOrders(*(tensor.cpu() for tensor in pack.orders))
    node_ptr, fact_ptr = pack.node_ptr.cpu().long(), pack.fact_ptr.cpu().long()
    node_graph, fact_graph = pack.node_graph.cpu(), pack.fact_graph.cpu()
    nodes, facts, graphs = orders.num_nodes, orders.num_facts, pack.num_graphs

    draw = torch.rand(graphs, 2, generator=generator)
    row = (node_ptr[:-1, None] + draw * node_ptr.diff()[:, None]).long().flatten().unique()
    shared = torch.bincount(node_graph[row], minlength=graphs)
    topic = torch.zeros(nodes)
    topic[row] = 1.0 / shared[node_graph[row]]
    label = (torch.rand(facts, generator=generator) < 0.04).float()
    label[fact_ptr[:-1]] = 1.0
    length = torch.randint(4, 13, (graphs,), generator=generator)
    mask = torch.arange(int(length.max())) < length.unsqueeze(1)
    states = torch.randn(*mask.shape, _TEXT, generator=generator) * mask.unsqueeze(2)
    words = torch.randn(pack.num_relations, 2, _WORDS, _TEXT, generator=generator)
    words_mask = torch.ones(words.shape[:3], dtype=torch.bool)

    near = (topic[orders.head] > 0) | (topic[orders.tail] > 0)
    relation = pack.relation.cpu()
    start = build_fact_orders(
        orders.head[near], orders.tail[near], relation[near], nodes, fact_graph[near]
    )
    every = torch.arange(facts + 1, dtype=torch.int32)
    tokens = torch.arange(2 * pack.num_relations * _WORDS, dtype=torch.int32)
    graph = PackedGraph(
        orders=orders,
        start=start,
        groups=FactGroups(every[:-1], every, every[:-1]),
        topic=topic,
        topic_row=_int(row),
        topic_graph=_int(node_graph[row]),
        node_count=torch.ones(nodes, dtype=torch.int32),
        node_graph=_int(node_graph),
        fact_graph=_int(fact_graph),
        node_ptr=_int(node_ptr),
        fact_ptr=_int(fact_ptr),
        label=label,
        question_key=torch.arange(graphs),
        num_graphs=graphs,
        num_nodes=nodes,
        num_facts=facts,
        max_facts=pack.max_facts,
    )
    token_ptr = _WORDS * torch.arange(2 * pack.num_relations + 1, dtype=torch.int32)
    ours = QuestionBatch(
        graph=graph,
        question_states=states,
        question_mask=mask,
        relation_row=torch.arange(pack.num_relations),
        relation_tokens=TokenPack(tokens, token_ptr, _WORDS),
        prefix=None,
        facts=None,
        target=None,
        rows=tuple(range(graphs)),
        num_labelled=int(torch.unique(fact_graph[label > 0.5]).numel()),
    )
    questions = []
    for i in range(graphs):
        a, b, n = int(fact_ptr[i]), int(fact_ptr[i + 1]), int(node_ptr[i])
        questions.append(
            pyg_question(
                head=orders.head[a:b] - n,
                tail=orders.tail[a:b] - n,
                relation=relation[a:b],
                topic=topic[n : int(node_ptr[i + 1])],
                label=label[a:b],
                states=states[i, : int(length[i])],
            )
        )
    relations = RelationStates(words.to(device), words_mask.to(device))
    return Questions(ours.to(device), pyg_batch(questions).to(device), relations)
