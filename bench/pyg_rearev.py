"""The opponent that packs too: ReaRev in eager PyG, all questions of a batch in one graph.

Every instruction and direction is its own propagate over the facts, with self-loops as edges, as
the model was published and as one writes it with PyG's tools. Weights are `Retriever`'s by name.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import MessagePassing, global_add_pool
from torch_geometric.utils import scatter, softmax

from dragkit.config import RetrieverConfig
from dragkit.retriever.text_encoder import RelationStates


class RelationMessage(MessagePassing):
    """o_v = sum_{e: target=v} p[source_e] relu(u[relation_e] * i[graph_e])."""

    def __init__(self) -> None:
        super().__init__(aggr="add", node_dim=0)

    def forward(
        self, p: Tensor, edge_index: Tensor, relation: Tensor, instruction: Tensor
    ) -> Tensor:
        """float [N], int64 [2, E], float [E, C] twice, to float [N, C]."""
        size = (p.shape[0], p.shape[0])
        return self.propagate(
            edge_index, p=p.unsqueeze(1), relation=relation, instruction=instruction, size=size
        )

    def message(self, p_j: Tensor, relation: Tensor, instruction: Tensor) -> Tensor:
        """float [E, C]."""
        return p_j * torch.relu(relation * instruction)


class Pooling(nn.Module):
    """Projects every token, then attends over the tokens of a text."""

    def __init__(self, text_dim: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(text_dim, width)
        self.relation_query = nn.Parameter(torch.empty(width))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Relation vectors: float [R, 2, W, D], bool [R, 2, W] to float [R, 2, C]."""
        tokens = self.project(states)
        attention = torch.softmax(
            (tokens @ self.relation_query).masked_fill(~mask, float("-inf")), dim=-1
        )
        return (attention.unsqueeze(-1) * tokens).sum(-2)


class Instructions(nn.Module):
    """K instructions, each attending over the question's projected tokens."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.query = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        self.combine = nn.Linear(4 * width, width)
        self.attend = nn.Parameter(torch.empty(width))

    def forward(self, tokens: Tensor, mask: Tensor) -> list[Tensor]:
        """float [B, T, C], bool [B, T] to K tensors [B, C]."""
        previous, found = torch.zeros_like(tokens[:, 0]), []
        for query in self.query:
            q = query(tokens[:, 0])
            z = self.combine(torch.cat([previous, q, q - previous, q * previous], dim=-1))
            score = (z.unsqueeze(1) * tokens) @ self.attend
            attention = torch.softmax(score.masked_fill(~mask, float("-inf")), dim=-1)
            previous = (attention.unsqueeze(-1) * tokens).sum(1)
            found.append(previous)
        return found


class Layer(nn.Module):
    """One hop: 2K propagates, their concatenation, one linear map.

    Args:
        width: C; count: K.
        per_fact: project relation features fact by fact, as the released code and PyG's `lin_edge`
            do; otherwise once per distinct relation of the batch.
    """

    def __init__(self, width: int, count: int, *, per_fact: bool) -> None:
        super().__init__()
        self.relation = nn.Linear(width, width)
        self.update = nn.Linear((2 * count + 1) * width, width)
        self.message = RelationMessage()
        self.per_fact = per_fact

    def forward(
        self,
        h: Tensor,
        p: Tensor,
        x: Tensor,
        instructions: list[Tensor],
        edge_index: Tensor,
        edge_type: Tensor,
        edge_graph: Tensor,
    ) -> Tensor:
        """float [N, C]."""
        directions = (edge_index, edge_index.flip(0))
        if self.per_fact:
            relation = [self.relation(x[edge_type, way]) for way in (0, 1)]
        else:
            table = self.relation(x)
            relation = [table[edge_type, way] for way in (0, 1)]
        parts = [h]
        for instruction in instructions:
            gate = instruction[edge_graph]
            for way, index in enumerate(directions):
                parts.append(self.message(p, index, relation[way], gate))
        return torch.relu(self.update(torch.cat(parts, dim=-1)))


class Revision(nn.Module):
    """Gated update of the instructions between two stages."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(count, 3 * width, width))
        self.value = nn.Parameter(torch.empty(count, 3 * width, width))

    def forward(self, instructions: list[Tensor], topic: Tensor) -> list[Tensor]:
        """K tensors [B, C] and float [B, C]."""
        revised = []
        for k, instruction in enumerate(instructions):
            features = torch.cat([instruction, topic, instruction - topic], dim=-1)
            gate = torch.sigmoid(features @ self.gate[k])
            revised.append(gate * (features @ self.value[k]) + (1 - gate) * instruction)
        return revised


class PackedPyGReaRev(nn.Module):
    """`Retriever`'s mathematics without the collapse, over a PyG batch.

    Args:
        config: sizes, dropout must be 0; text_dim: width of the token states.
        per_fact: see `Layer`.
    """

    def __init__(self, config: RetrieverConfig, text_dim: int, *, per_fact: bool = False) -> None:
        super().__init__()
        if config.dropout:
            raise ValueError("the comparison is exact only without dropout")
        width, count = config.hidden_dim, config.num_instructions
        self.num_stages = config.num_stages
        self.pooling = Pooling(text_dim, width)
        self.instructions = Instructions(width, count)
        self.start = nn.Linear(width, width)
        self.self_relation = nn.Parameter(torch.empty(width))
        self.layers = nn.ModuleList(
            Layer(width, count, per_fact=per_fact) for _ in range(config.num_reasoning_steps)
        )
        self.node_score = nn.Linear(width, 1)
        self.revision = Revision(width, count)
        self.fact_score = nn.Linear(3 * width, 1)

    def forward(self, batch: Batch, relations: RelationStates) -> Tensor:
        """Fact logits, float32 [E]."""
        head, tail = batch.edge_index
        rows, edge_type = torch.unique(batch.edge_type, return_inverse=True)
        x = self.pooling(relations.states[rows], relations.mask[rows])
        tokens = self.pooling.project(batch.question)
        instructions = self.instructions(tokens, batch.question_mask)

        start = self.start(x[:, 0])[edge_type]
        nodes = batch.num_nodes
        h = torch.relu(scatter(start, tail, 0, nodes) + scatter(start, head, 0, nodes))

        loops = torch.arange(nodes, device=head.device)
        edge_index = torch.cat([batch.edge_index, loops.expand(2, -1)], dim=1)
        all_types = torch.cat([edge_type, torch.full_like(loops, x.shape[0])])
        with_self = torch.cat([x, self.self_relation.expand(1, 2, -1)])
        edge_graph = batch.batch[edge_index[0]]
        topic = (batch.topic > 0).to(h.dtype).unsqueeze(1)
        for stage in range(self.num_stages):
            if stage:
                instructions = self.revision(instructions, global_add_pool(h * topic, batch.batch))
            p = batch.topic
            for layer in self.layers:
                h = layer(h, p, with_self, instructions, edge_index, all_types, edge_graph)
                p = softmax(self.node_score(h).squeeze(1), batch.batch, num_nodes=batch.num_graphs)
        facts = torch.cat([h[head], x[edge_type, 0], h[tail]], dim=-1)
        return self.fact_score(facts).squeeze(1)


def pyg_question(
    head: Tensor,
    tail: Tensor,
    relation: Tensor,
    topic: Tensor,
    label: Tensor,
    states: Tensor,
) -> Data:
    """One question as a PyG graph, kept ready in memory.

    Args:
        head, tail, relation: int [E]; relation counts in the data set's relation table.
        topic: float [N]; label: float [E]; states: float [T, D] token states of the question.
    """
    return Data(
        edge_index=torch.stack([head, tail]).long(),
        edge_type=relation.long(),
        topic=topic,
        label=label,
        states=states,
        num_nodes=topic.shape[0],
    )


def pyg_batch(questions: list[Data]) -> Batch:
    """PyG's own collation, and the questions' token states padded to the longest."""
    batch = Batch.from_data_list(questions, exclude_keys=["states"])
    texts = [question.states for question in questions]
    batch.question = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    length = torch.tensor([len(text) for text in texts])
    batch.question_mask = torch.arange(int(length.max())) < length.unsqueeze(1)
    facts = torch.tensor([0, *(question.num_edges for question in questions)])
    batch.fact_ptr = facts.cumsum(0).int()
    return batch
