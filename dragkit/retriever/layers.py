"""Parts of the ReaRev retriever: instructions, relation vectors, reasoning layer, revision, scorer.

Wherever a linear map is followed by a weighted sum, the sum comes first: pooling the 384-wide token
states and then projecting one row costs a fraction of projecting every token.
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
    """Softmax over the last dimension of the True places; rows without any give zeros."""
    lowest = torch.finfo(torch.float32).min
    return torch.softmax(score.float().masked_fill(~mask, lowest), -1) * mask


class TokenPooling(nn.Module):
    """The projection shared by question and relation tokens, and attention pooling through it.

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
            states: float [..., T, D]; mask: bool [..., T]; query: float [..., C] or [C].

        Returns:
            float [..., C].
        """
        if states.shape[-2] == 0:
            return self.project(states.new_zeros(*states.shape[:-2], states.shape[-1]))
        weight = self.project.weight
        direction = query @ weight  # the bias moves all scores alike and drops out of the softmax
        if direction.dim() == 1:
            score = states @ direction
        else:
            score = (states @ direction.unsqueeze(-1)).squeeze(-1)
        attention = _masked_softmax(score, mask)
        pooled = (attention.unsqueeze(-2).to(states.dtype) @ states).squeeze(-2)
        return self.project(pooled)

    def relations(self, states: Tensor, tokens: TokenPack) -> Tensor:
        """Relation vectors x_r, forward and inverse.

        Args:
            states: float [..., D] token states of all relations, frozen.
            tokens: the states' rows of 2R texts, each relation's two after each other.

        Returns:
            float [R, 2, C].
        """
        table = states.flatten(0, -2)
        query = (self.relation_query @ self.project.weight).to(table.dtype)
        pooled = attention_pool(table, query, tokens.ids, tokens.ptr)
        return self.project(pooled).unflatten(0, (-1, 2))


class InstructionStack(nn.Module):
    """K instructions of a question, each attending to its tokens.

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
        """float [B, T, D], bool [B, T] to instructions, float [B, I, C]."""
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
    """A layer's products with the relations, and its update matrix cut into blocks.

    Attributes:
        relation: float [2, R+1, C] W_j x_r + b_j in both directions; the last row is the self-loop.
        own: float [C, C] the block for the node's own state.
        sums: float [2, I*C, C] the blocks for the sums over facts, by direction.
    """

    relation: Tensor
    own: Tensor
    sums: Tensor


class GatePairs(NamedTuple):
    """The (graph, relation) pairs of some facts, and then one pair a graph: its self-loops.

    Attributes:
        relation, graph: int32 [P+B] row of the layers' relations and graph of each.
        pairs_by_relation, pairs_by_graph: both grouped, for the gates' backward sums; None
            where nothing reads them: without a backward, and on PyTorch's kernels.
    """

    relation: Tensor
    graph: Tensor
    pairs_by_relation: GroupedIndex | None
    pairs_by_graph: GroupedIndex | None

    def without_self_loops(self) -> tuple[GroupedIndex | None, GroupedIndex | None]:
        """Both orders for the pairs of the facts alone, which need no sorting again.

        Self-loops have the last relation, and come last in their graphs; the pairs themselves
        ascend by graph.
        """
        if self.pairs_by_relation is None or self.pairs_by_graph is None:
            return None, None
        ends = self.pairs_by_graph.ptr
        loops = torch.arange(ends.shape[0], dtype=torch.int32, device=ends.device)
        pairs = self.relation.shape[0] - ends.shape[0] + 1
        perm = torch.arange(pairs, dtype=torch.int32, device=ends.device)
        by_relation = self.pairs_by_relation
        return (
            GroupedIndex(by_relation.perm[:pairs], by_relation.ptr[:-1]),
            GroupedIndex(perm, ends - loops),
        )


def gate_pairs(fact_index: FactIndex, num_graphs: int, like: Tensor) -> GatePairs:
    """What all layers over the same facts share.

    Args:
        fact_index: the facts; num_graphs: B.
        like: float [R, ...] relation vectors, which decide what runs; row R stands for the
            self-loop.
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

    All 2K products of a relation with an instruction are turned into one C-wide row per (graph,
    relation) and direction before the facts are visited, so the loop over facts does not depend on
    K. Dropout acts on the node states and on those rows, not on the sums.
    `per_instruction` computes the published un-collapsed sums instead; without dropout both
    are equal.
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
        """What the layer computes once per pack, however many stages use it.

        Args:
            relation: float [2, R+1, C] relation vectors, forward and inverse, self-loop last.
        """
        width = self.hidden_dim
        own, sums = self.update.weight.split([width, 2 * self.num_instructions * width], dim=1)
        blocks = sums.view(width, self.num_instructions, 2, width).permute(2, 1, 3, 0)
        projected = self.relation(relation)
        # Like the node states: autocast does not look into the op that multiplies the two. Rows in
        # one piece, as the kernel reads them: else every layer of every stage would copy it.
        own = own.t().to(projected.dtype, memory_format=torch.contiguous_format)
        return LayerTables(projected, own, blocks.reshape(2, -1, width))

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
        """Node states after one hop.

        Args:
            h: float [N, C]; p: float32 [N] node distribution.
            tables: of `prepare`; instruction: float [B, I, C].
            fact_index: the facts; pairs: theirs, by `gate_pairs`; node_graph: int32 [N].

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
        c = relation_gate(
            u,
            instruction.to(u.dtype),  # under autocast the two come from maps of other precisions
            pairs.relation,
            pairs.graph,
            pairs_by_relation=pairs.pairs_by_relation,
            pairs_by_graph=pairs.pairs_by_graph,
        )
        rows = torch.bmm(self.dropout(c).flatten(2), tables.sums)
        pair_rows, own_rows = rows.split([fact_index.num_pairs, instruction.shape[0]], dim=1)
        table_fwd, table_inv = pair_rows.unbind()
        return message_passing(
            self.dropout(h),
            p,
            table_fwd,
            table_inv,
            own_rows.sum(0),
            tables.own,
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
        """float [B, I, C] and float [B, C] (sum over topic nodes) to float [B, I, C]."""
        y = topic_state.unsqueeze(1).expand_as(instruction)
        features = torch.cat([instruction, y, instruction - y], dim=-1).transpose(0, 1)
        gate = torch.sigmoid(torch.bmm(features, self.gate)).transpose(0, 1)
        value = torch.bmm(features, self.value).transpose(0, 1)
        return gate * value + (1 - gate) * instruction
