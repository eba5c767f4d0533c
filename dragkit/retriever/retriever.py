"""The graph retriever: ReaRev over packed subgraphs, with a linear score for every fact."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dragkit.config import RetrieverConfig
from dragkit.data.packed import PackedGraph, QuestionBatch
from dragkit.retriever.layers import (
    InstructionRevision,
    InstructionStack,
    ReasoningLayer,
    TokenPooling,
    gate_pairs,
)
from dragkit.retriever.text_encoder import RelationStates
from dragkit_kernels import (
    FactIndex,
    GroupedIndex,
    fact_scores,
    gather_rows,
    relation_sum,
    segment_softmax,
    segment_sum,
)


class RetrieverOutput(NamedTuple):
    """Scores and representations of one pack.

    Attributes:
        fact_logits: float32 [E]; the probability of a fact is its sigmoid.
        node: float [N, C] final node states.
        relation: float [P, C] relation part of a fact's representation, one row per (graph,
            relation) pair.
    """

    fact_logits: Tensor
    node: Tensor
    relation: Tensor


class Retriever(nn.Module):
    """ReaRev (Mavromatis and Karypis, 2022) with the linear fact head of D-RAG (docs/method.md).

    T stages of L layers; the distribution p restarts from the topics at every stage while the node
    states go on; between stages the K instructions are revised from the topic nodes. A fact (s, r,
    t) is scored by w . [h_s ; x_r ; h_t] + b, computed as three scalar tables.

    Args:
        config: sizes.
        text_dim: width of the sentence encoder's token states.
    """

    def __init__(self, config: RetrieverConfig, text_dim: int) -> None:
        super().__init__()
        width = config.hidden_dim
        self.config = config
        self.pooling = TokenPooling(text_dim, width)
        self.instructions = InstructionStack(width, config.num_instructions, config.dropout)
        self.start = nn.Linear(width, width)
        self.self_relation = nn.Parameter(torch.randn(width) / width**0.5)
        self.layers = nn.ModuleList(
            ReasoningLayer(
                width,
                config.num_instructions,
                config.dropout,
                per_instruction=config.message == "per_instruction",
            )
            for _ in range(config.num_reasoning_steps)
        )
        self.node_score = nn.Linear(width, 1)
        self.revision = InstructionRevision(width, config.num_instructions)
        self.fact_score = nn.Linear(3 * width, 1)
        self.dropout = nn.Dropout(config.dropout)

    @property
    def fact_dim(self) -> int:
        """Width of a fact's representation [h_s ; x_r ; h_t]."""
        return 3 * self.config.hidden_dim

    def forward(self, batch: QuestionBatch, relations: RelationStates) -> RetrieverOutput:
        """Scores every fact of the pack.

        Args:
            batch: the pack.
            relations: the data set's relation token states, on the pack's device.

        Returns:
            Logits and representations.
        """
        graph, fact_index = batch.graph, batch.graph.fact_index
        x = self.pooling.relations(relations.states, batch.relation_tokens)
        instruction = self.instructions(self.pooling, batch.question_states, batch.question_mask)
        topic_pairs, all_pairs = (
            gate_pairs(facts, graph.num_graphs, x) for facts in (graph.topic_facts, fact_index)
        )
        by_relation, by_graph = all_pairs.without_self_loops()
        h = self._initial_states(x, fact_index, by_relation)
        relations_and_loop = torch.cat(
            [x.transpose(0, 1), self.self_relation.expand(2, 1, -1)], dim=1
        )
        tables = [layer.prepare(relations_and_loop) for layer in self.layers]
        for stage in range(self.config.num_stages):
            if stage:
                instruction = self.revision(instruction, self._topic_states(h, graph))
            # The topics hold the whole distribution when a stage begins, so only facts that touch a
            # topic carry a message in its first layer.
            p, facts, pairs = graph.topic_prob, graph.topic_facts, topic_pairs
            for depth, (layer, layer_tables) in enumerate(zip(self.layers, tables, strict=True)):
                if depth:
                    p, facts, pairs = self._node_distribution(h, graph), fact_index, all_pairs
                h = layer(h, p, layer_tables, instruction, facts, pairs, graph.node_graph)
        relation = self._relation_feature(x, instruction, fact_index, by_relation, by_graph)
        return RetrieverOutput(self._fact_logits(h, relation, graph), h, relation)

    def _initial_states(
        self, x: Tensor, fact_index: FactIndex, by_relation: GroupedIndex | None
    ) -> Tensor:
        """float [N, C]: relu of the sum of a node's incident relations, mapped by `start`."""
        rows = gather_rows(self.start(x[:, 0]), fact_index.pair_relation, by_row=by_relation)
        return torch.relu(relation_sum(rows, fact_index=fact_index))

    def _topic_states(self, h: Tensor, graph: PackedGraph) -> Tensor:
        """float [B, C]: sum of the states of each graph's topic nodes."""
        count = graph.node_count.index_select(0, graph.topic_node).to(h.dtype).unsqueeze(1)
        topics = gather_rows(h, graph.topic_node) * count
        return segment_sum(topics, graph.topic_graph, graph.num_graphs)

    def _node_distribution(self, h: Tensor, graph: PackedGraph) -> Tensor:
        """float [N]: softmax of the node scores over each graph."""
        score = self.node_score(self.dropout(h)).squeeze(1)
        return segment_softmax(score, graph.node_ptr, count=graph.node_count)

    def _fact_logits(self, h: Tensor, relation: Tensor, graph: PackedGraph) -> Tensor:
        """float32 [E]: w . [h_s ; x_r ; h_t] + b, from scalars per node and per pair."""
        weight = self.fact_score.weight.view(3, -1)
        ends = (self.dropout(h) @ weight[::2].t()).float()
        return fact_scores(
            ends[:, 0],
            (relation @ weight[1]).float(),
            ends[:, 1],
            self.fact_score.bias.float().squeeze(0),
            fact_index=graph.fact_index,
            groups=graph.groups,
        )

    def _relation_feature(
        self,
        x: Tensor,
        instruction: Tensor,
        fact_index: FactIndex,
        by_relation: GroupedIndex | None,
        by_graph: GroupedIndex | None,
    ) -> Tensor:
        """float [P, C]: x_r, plus its product with the instructions when so configured."""
        static = gather_rows(x[:, 0], fact_index.pair_relation, by_row=by_relation)
        if not self.config.gate_relation_by_instruction:
            return static
        gate = gather_rows(instruction.mean(1), fact_index.pair_graph, by_row=by_graph)
        return static + static * gate
