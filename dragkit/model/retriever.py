"""The graph retriever: ReaRev over packed subgraphs, with a linear score for every fact."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dragkit.config import RetrieverConfig
from dragkit.data.packed import QuestionBatch
from dragkit.model.encoder import RelationStates
from dragkit.model.layers import (
    InstructionRevision,
    InstructionStack,
    ReasoningLayer,
    TokenPooling,
    gate_pairs,
)
from dragkit_kernels import (
    FactOrders,
    RowOrder,
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
                parity=config.message == "parity",
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

    @property
    def _scores_at_once(self) -> bool:
        """Whether a layer can score its own states: no dropout stands in between."""
        return not self.training or self.dropout.p == 0

    def forward(self, batch: QuestionBatch, relations: RelationStates) -> RetrieverOutput:
        """Scores every fact of the pack.

        Args:
            batch: the pack.
            relations: the data set's relation token states, on the pack's device.

        Returns:
            Logits and representations.
        """
        graph, orders = batch.graph, batch.graph.orders
        x = self.pooling.relations(relations.states, batch.relation_tokens)
        instruction = self.instructions(self.pooling, batch.question_states, batch.question_mask)
        start_pairs, all_pairs = (
            gate_pairs(facts, graph.num_graphs, x) for facts in (graph.start, orders)
        )
        by_relation, by_graph = all_pairs.without_loops()
        start = gather_rows(self.start(x[:, 0]), orders.pair_relation, order=by_relation)
        h = torch.relu(relation_sum(start, orders=orders))
        topic_count = graph.node_count.index_select(0, graph.topic_row).to(h.dtype).unsqueeze(1)
        relation = torch.cat([x.transpose(0, 1), self.self_relation.expand(2, 1, -1)], 1)
        tables = [layer.prepare(relation) for layer in self.layers]
        fact_weight = self.fact_score.weight.view(3, -1)
        for stage in range(self.config.num_stages):
            if stage:
                topics = gather_rows(h, graph.topic_row) * topic_count
                topic_state = segment_sum(topics, graph.topic_graph, graph.num_graphs)
                instruction = self.revision(instruction, topic_state)
            p, score = graph.topic, None
            for depth, (layer, layer_tables) in enumerate(zip(self.layers, tables, strict=True)):
                if depth:
                    if score is None:
                        score = self.node_score(self.dropout(h))
                    else:
                        score = score + self.node_score.bias
                    p = segment_softmax(score.squeeze(1), graph.node_ptr, count=graph.node_count)
                # At first p is zero away from the topics, so other facts carry nothing.
                facts, pairs = (orders, all_pairs) if depth else (graph.start, start_pairs)
                which = None
                if self._scores_at_once and depth + 1 < len(self.layers):
                    which = self.node_score.weight
                elif self._scores_at_once and stage + 1 == self.config.num_stages:
                    which = fact_weight[::2]
                where = (facts, pairs, graph.node_graph)
                found = layer(h, p, layer_tables, instruction, *where, score_weight=which)
                h, score = (found, None) if which is None else found
        relation = self._relation_feature(x, instruction, orders, by_relation, by_graph)
        ends = self.dropout(h) @ fact_weight[::2].t() if score is None else score
        ends = ends.float()
        logits = fact_scores(
            ends[:, 0],
            (relation @ fact_weight[1]).float(),
            ends[:, 1],
            self.fact_score.bias.float().squeeze(0),
            orders=orders,
            groups=graph.groups,
        )
        return RetrieverOutput(logits, h, relation)

    def _relation_feature(
        self,
        x: Tensor,
        instruction: Tensor,
        orders: FactOrders,
        by_relation: RowOrder | None,
        by_graph: RowOrder | None,
    ) -> Tensor:
        """float [P, C]: x_r, plus its product with the instructions when so configured."""
        static = gather_rows(x[:, 0], orders.pair_relation, order=by_relation)
        if self.config.fact_relation == "static":
            return static
        gate = gather_rows(instruction.mean(1), orders.pair_graph, order=by_graph)
        return static + static * gate
