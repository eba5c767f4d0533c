"""Modules of the ReaRev retriever: instructions, relation vectors, reasoning layer, revision.

A weighted sum is taken before the linear map that follows it. Pooling 384-wide token states and
projecting one row costs a fraction of projecting every token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dragkit.data.packed import TokenPack
from dragkit_kernels import (
    FactIndex,
    GroupedIndex,
    attention_pool,
    grouped_index,
    message_passing,
    message_passing_per_instruction,
    relation_gate,
    resolve_backend,
)


def _masked_softmax(score: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the True entries of the last dimension. A row without any gives zeros."""
    # Filling with -inf would make a row without True entries NaN.
    lowest = torch.finfo(torch.float32).min
    return torch.softmax(score.float().masked_fill(~mask, lowest), -1) * mask


class TokenPooling(nn.Module):
    """Attention pooling of token states through one projection, for questions and relations.

    Args:
        text_dim: width D of the encoder's token states.
        hidden_dim: width C.
    """

    def __init__(self, text_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(text_dim, hidden_dim)
        self.relation_query = nn.Parameter(torch.randn(hidden_dim) / math.sqrt(hidden_dim))

    def pool(self, states: Tensor, mask: Tensor, query: Tensor) -> Tensor:
        """sum_t softmax_t(query . y_t) y_t with y_t = W states_t + b.

        Args:
            states: float [..., T, D].
            mask: bool [..., T].
            query: float [..., C] or [C].

        Returns:
            float [..., C].
        """
        if states.shape[-2] == 0:
            return self.project(states.new_zeros(*states.shape[:-2], states.shape[-1]))
        # query . b is the same for all tokens, so the bias has no effect in the softmax.
        state_query = query @ self.project.weight
        if state_query.dim() == 1:
            score = states @ state_query
        else:
            score = (states @ state_query.unsqueeze(-1)).squeeze(-1)
        attention = _masked_softmax(score, mask)
        pooled = (attention.unsqueeze(-2).to(states.dtype) @ states).squeeze(-2)
        return self.project(pooled)

    def relations(self, states: Tensor, tokens: TokenPack) -> Tensor:
        """Computes relation vectors x_r, forward and inverse.

        Args:
            states: float [T, D] frozen token states of all relations of the data set.
            tokens: rows of `states` of 2R texts, see `QuestionBatch.relation_tokens`.

        Returns:
            float [R, 2, C].
        """
        query = (self.relation_query @ self.project.weight).to(states.dtype)
        pooled = attention_pool(states, query, tokens.ids, tokens.ptr)
        return self.project(pooled).unflatten(0, (-1, 2))


class InstructionStack(nn.Module):
    """K instructions of a question. Each attends to the question's tokens and to the previous one.

    Source: ReaRev (Mavromatis and Karypis, 2022).
    """

    def __init__(self, hidden_dim: int, num_instructions: int, dropout: float) -> None:
        super().__init__()
        self.query = nn.ModuleList(
            nn.Linear(hidden_dim, hidden_dim) for _ in range(num_instructions)
        )
        self.combine = nn.Linear(4 * hidden_dim, hidden_dim)
        self.attend = nn.Parameter(torch.randn(hidden_dim) / math.sqrt(hidden_dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, pooling: TokenPooling, states: Tensor, mask: Tensor) -> Tensor:
        """Computes instructions, float [B, I, C], from states [B, T, D] and mask, bool [B, T]."""
        first = pooling.project(states[:, 0])
        previous = torch.zeros_like(first)
        instructions = []
        for query in self.query:
            q = query(self.dropout(first))
            joined = torch.cat([previous, q, q - previous, q * previous], dim=-1)
            z = self.combine(self.dropout(joined))
            previous = pooling.pool(states, mask, self.dropout(z * self.attend))
            instructions.append(previous)
        return torch.stack(instructions, dim=1)


class LayerTables(NamedTuple):
    """The tensors that a layer computes once per pack.

    Attributes:
        relation: float [2, R+1, C] W_j x_r + b_j in both directions. The last row is the self-loop.
        self_weight: float [C, C] block of the update matrix for the node's own state.
        sum_weight: float [2, I*C, C] blocks for the sums over facts, by direction.
    """

    relation: Tensor
    self_weight: Tensor
    sum_weight: Tensor


class GatePairs(NamedTuple):
    """P (graph, relation) pairs of some facts, followed by the self-loop of each of B graphs.

    Attributes:
        relation, graph: int32 [P+B] relation row and graph of each pair.
        pairs_by_relation, pairs_by_graph: the pairs grouped for the backward sums of the gates.
            None if nothing reads them: where no backward runs, and with the PyTorch backend.
    """

    relation: Tensor
    graph: Tensor
    pairs_by_relation: GroupedIndex | None
    pairs_by_graph: GroupedIndex | None

    def without_self_loops(self) -> tuple[GroupedIndex | None, GroupedIndex | None]:
        """Returns both groupings of the P pairs of the facts alone."""
        if self.pairs_by_relation is None or self.pairs_by_graph is None:
            return None, None
        # No sort is needed. Self-loops have the last relation and come last in their graph, and
        # the pairs themselves ascend by graph.
        perm, ptr = self.pairs_by_relation
        graph_ptr = self.pairs_by_graph.ptr
        num_pairs = self.relation.shape[0] - graph_ptr.shape[0] + 1
        num_loops = torch.arange(graph_ptr.shape[0], dtype=torch.int32, device=graph_ptr.device)
        ascending = torch.arange(num_pairs, dtype=torch.int32, device=graph_ptr.device)
        return (
            GroupedIndex(perm[:num_pairs], ptr[:-1]),
            GroupedIndex(ascending, graph_ptr - num_loops),
        )


def gate_pairs(fact_index: FactIndex, num_graphs: int, like: Tensor) -> GatePairs:
    """Lists the (graph, relation) pairs that all layers over the same facts share.

    Args:
        fact_index: the facts.
        num_graphs: B.
        like: float [R, ...] relation vectors, which select the backend. Row R is the self-loop.
    """
    num_relations = like.shape[0]
    graphs = torch.arange(num_graphs, dtype=torch.int32, device=fact_index.pair_graph.device)
    relation = torch.cat([fact_index.pair_relation, torch.full_like(graphs, num_relations)])
    graph = torch.cat([fact_index.pair_graph, graphs])
    if not torch.is_grad_enabled() or resolve_backend("relation_gate", like) == "torch":
        return GatePairs(relation, graph, None, None)
    by_relation = grouped_index(relation, num_relations + 1)
    return GatePairs(relation, graph, by_relation, grouped_index(graph, num_graphs))


class ReasoningLayer(nn.Module):
    """One ReaRev layer in its collapsed form (docs/method.md, section 3).

    All 2K products of a relation with an instruction become one C-wide row per (graph, relation)
    and direction before the facts are visited, so the sum over facts does not depend on K. Dropout
    acts on the node states and on these rows. `per_instruction` computes the published sums
    instead, with dropout on the sums. Without dropout both give the same states.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_instructions: int,
        dropout: float,
        *,
        per_instruction: bool = False,
    ) -> None:
        super().__init__()
        self.relation = nn.Linear(hidden_dim, hidden_dim)
        self.update = nn.Linear((2 * num_instructions + 1) * hidden_dim, hidden_dim)
        self.dropout = nn.Dropout(dropout)
        self.hidden_dim = hidden_dim
        self.num_instructions = num_instructions
        self.per_instruction = per_instruction

    def prepare(self, relation: Tensor) -> LayerTables:
        """Computes the tables that all stages of a pack share.

        Args:
            relation: float [2, R+1, C] relation vectors, forward and inverse, self-loop last.
        """
        width = self.hidden_dim
        own, rest = self.update.weight.split([width, 2 * self.num_instructions * width], dim=1)
        blocks = rest.view(width, self.num_instructions, 2, width).permute(2, 1, 3, 0)
        projected = self.relation(relation)
        # Cast to the dtype of the node states, because autocast does not cast the arguments of
        # `message_passing`. Make it contiguous, or every layer of every stage would copy it.
        self_weight = own.t().to(projected.dtype, memory_format=torch.contiguous_format)
        return LayerTables(projected, self_weight, blocks.reshape(2, -1, width))

    def forward(
        self,
        h: Tensor,
        p: Tensor,
        tables: LayerTables,
        instruction: Tensor,
        fact_index: FactIndex,
        pairs: GatePairs,
        node_graph: Tensor,
    ) -> Tensor:
        """Updates the node states along the facts.

        Args:
            h: float [N, C] node states.
            p: float32 [N] node distribution.
            tables: result of `prepare`.
            instruction: float [B, I, C].
            fact_index: the facts.
            pairs: result of `gate_pairs` for the same facts.
            node_graph: int32 [N].

        Returns:
            float [N, C].
        """
        u = tables.relation
        if self.per_instruction:
            sums = message_passing_per_instruction(
                p,
                u[0, :-1],
                u[1, :-1],
                u[0, -1],
                u[1, -1],
                instruction,
                fact_index=fact_index,
                node_graph=node_graph,
            )
            joined = torch.cat([self.dropout(h), self.dropout(sums).flatten(1)], dim=1)
            return torch.relu(self.update(joined))
        gated = relation_gate(
            u,
            # Under autocast the two come from maps of different precision.
            instruction.to(u.dtype),
            pairs.relation,
            pairs.graph,
            pairs_by_relation=pairs.pairs_by_relation,
            pairs_by_graph=pairs.pairs_by_graph,
        )
        rows = torch.bmm(self.dropout(gated).flatten(2), tables.sum_weight)
        pair_rows, loop_rows = rows.split([fact_index.num_pairs, instruction.shape[0]], dim=1)
        table_fwd, table_inv = pair_rows.unbind()
        return message_passing(
            self.dropout(h),
            p,
            table_fwd,
            table_inv,
            loop_rows.sum(0),
            tables.self_weight,
            self.update.bias,
            fact_index=fact_index,
            node_graph=node_graph,
        )


class InstructionRevision(nn.Module):
    """Gated update of the instructions from the topic nodes' states (as in ReaRev)."""

    def __init__(self, hidden_dim: int, num_instructions: int) -> None:
        super().__init__()
        shape = (num_instructions, 3 * hidden_dim, hidden_dim)
        self.gate = nn.Parameter(torch.empty(shape))
        self.value = nn.Parameter(torch.empty(shape))
        for weight in (self.gate, self.value):
            nn.init.uniform_(weight, -1 / math.sqrt(shape[1]), 1 / math.sqrt(shape[1]))

    def forward(self, instruction: Tensor, topic_state: Tensor) -> Tensor:
        """Revises instructions, float [B, I, C], by the sum of the topic states, float [B, C]."""
        y = topic_state.unsqueeze(1).expand_as(instruction)
        features = torch.cat([instruction, y, instruction - y], dim=-1).transpose(0, 1)
        gate = torch.sigmoid(torch.bmm(features, self.gate)).transpose(0, 1)
        value = torch.bmm(features, self.value).transpose(0, 1)
        return gate * value + (1 - gate) * instruction
