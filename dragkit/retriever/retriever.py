"""The graph retriever: ReaRev over packed graphs, with a linear score for every fact."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dragkit.config import RetrieverConfig
from dragkit.data.packed import PackedGraph, QuestionBatch, RelationStates
from dragkit.retriever.layers import (
    InstructionRevision,
    InstructionStack,
    ReasoningLayer,
    TokenPooling,
    gate_pairs,
)
from dragkit_kernels import (
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
        fact_logits: float32 [E]. The probability of a fact is the sigmoid of its logit.
        node: float [N, C] final node states.
        relation: float [P, C] relation part of a fact's representation, one row for each (graph,
            relation) pair.
    """

    fact_logits: Tensor
    node: Tensor
    relation: Tensor


def _scores(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight, [M], from x [M, C] and weight [C], in float32 under autocast too."""
    # In bfloat16 facts with close logits would tie. Unlike a matrix product, a sum is not lowered
    # by autocast or TF32, its bits do not depend on M, and a compiler fuses it with what made x.
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * weight.to(wide)).sum(-1)


class Retriever(nn.Module):
    """ReaRev (Mavromatis and Karypis, 2022) with the linear fact head of D-RAG (docs/method.md).

    T stages of L layers update the node states h. Every stage restarts the node distribution p at
    the topics. Between stages the K instructions are revised with the states of the topics. A fact
    (s, r, t) has the score w . [h_s ; x_r ; h_t] + b.

    Args:
        config: sizes and variants.
        text_dim: width of the token states of the sentence encoder.
    """

    def __init__(self, config: RetrieverConfig, text_dim: int) -> None:
        super().__init__()
        width = config.hidden_dim
        self.config = config
        self.pooling = TokenPooling(text_dim, width)
        self.instructions = InstructionStack(width, config.num_instructions, config.dropout)
        # Maps relations for the initial node states. Checkpoints contain the name `start`.
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
            relations: token states of the data set's relations, on the pack's device.
        """
        graph = batch.graph
        x = self.pooling.relations(relations.states, batch.relation_tokens)  # [R, 2, C]
        instruction = self.instructions(self.pooling, batch.question_states, batch.question_mask)
        topic_pairs = gate_pairs(graph.topic_facts, graph.num_graphs, x)
        all_pairs = gate_pairs(graph.fact_index, graph.num_graphs, x)
        by_relation, by_graph = all_pairs.without_self_loops()
        h = self._initial_states(x, graph, by_relation)
        self_loop = self.self_relation.expand(2, 1, -1)
        relation = torch.cat([x.transpose(0, 1), self_loop], dim=1)  # [2, R+1, C]
        tables = [layer.prepare(relation) for layer in self.layers]

        for stage in range(self.config.num_stages):
            if stage > 0:
                instruction = self.revision(instruction, self._topic_states(h, graph))
            # p is 0 except at the topics when a stage begins, so only facts that touch a topic
            # carry a message in its first layer.
            p, facts, pairs = graph.topic_prob, graph.topic_facts, topic_pairs
            for depth, (layer, table) in enumerate(zip(self.layers, tables, strict=True)):
                if depth > 0:
                    p = self._node_distribution(h, graph)
                    facts, pairs = graph.fact_index, all_pairs
                h = layer(h, p, table, instruction, facts, pairs, graph.node_graph)
        feature = self._relation_feature(x, instruction, graph, by_relation, by_graph)
        return RetrieverOutput(self._fact_logits(h, feature, graph), h, feature)

    def _initial_states(
        self, x: Tensor, graph: PackedGraph, by_relation: GroupedIndex | None
    ) -> Tensor:
        """Computes h0, float [N, C]: relu of the sum of a node's mapped incident relations."""
        pair_relation = graph.fact_index.pair_relation
        h0_rows = gather_rows(self.start(x[:, 0]), pair_relation, by_row=by_relation)  # [P, C]
        return torch.relu(relation_sum(h0_rows, fact_index=graph.fact_index))

    def _topic_states(self, h: Tensor, graph: PackedGraph) -> Tensor:
        """Sums the states of the topic nodes of each graph, float [B, C]."""
        count = graph.node_count.index_select(0, graph.topic_node).to(h.dtype).unsqueeze(1)
        topic_states = gather_rows(h, graph.topic_node) * count
        return segment_sum(topic_states, graph.topic_graph, graph.num_graphs)

    def _node_distribution(self, h: Tensor, graph: PackedGraph) -> Tensor:
        """Computes p, float [N]: softmax of the node scores over each graph."""
        score = _scores(self.dropout(h), self.node_score.weight[0]) + self.node_score.bias
        return segment_softmax(score, graph.node_ptr, count=graph.node_count)

    def _fact_logits(self, h: Tensor, relation_feature: Tensor, graph: PackedGraph) -> Tensor:
        """Computes w . [h_s ; x_r ; h_t] + b, float32 [E]."""
        # The score is a sum of one scalar per head, pair and tail, so [E, 3C] is never built.
        head, relation, tail = self.fact_score.weight.view(3, -1)
        dropped = self.dropout(h)
        return fact_scores(
            _scores(dropped, head).float(),
            _scores(relation_feature, relation).float(),
            _scores(dropped, tail).float(),
            self.fact_score.bias.float().squeeze(0),
            fact_index=graph.fact_index,
            groups=graph.groups,
        )

    def _relation_feature(
        self,
        x: Tensor,
        instruction: Tensor,
        graph: PackedGraph,
        by_relation: GroupedIndex | None,
        by_graph: GroupedIndex | None,
    ) -> Tensor:
        """Computes the relation part of facts, float [P, C]: x_r, or x_r + x_r * i if gated.

        i is the mean of the graph's instructions.
        """
        index = graph.fact_index
        relation = gather_rows(x[:, 0], index.pair_relation, by_row=by_relation)
        if not self.config.gate_relation_by_instruction:
            return relation
        gate = gather_rows(instruction.mean(1), index.pair_graph, by_row=by_graph)
        return relation + relation * gate
