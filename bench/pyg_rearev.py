"""ReaRev in eager PyG over packs: all questions of a batch in one graph.

As published, every instruction and direction has its own propagate over the facts, with self-loops
as edges. The parts that do not run over the graph are `Retriever`'s. The weights have its names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import MessagePassing, global_add_pool
from torch_geometric.utils import scatter, softmax

from dragkit.config import RetrieverConfig
from dragkit.retriever.layers import InstructionRevision, InstructionStack, TokenPooling
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


class Layer(nn.Module):
    """One hop: 2K propagates, their concatenation, one linear map.

    Args:
        width: C.
        num_instructions: K.
        per_fact: project relation features fact by fact, as the released code and PyG's `lin_edge`
            do, and not once per distinct relation of the batch.
    """

    def __init__(self, width: int, num_instructions: int, *, per_fact: bool) -> None:
        super().__init__()
        self.relation = nn.Linear(width, width)
        self.update = nn.Linear((2 * num_instructions + 1) * width, width)
        self.message = RelationMessage()
        self.per_fact = per_fact

    def forward(
        self,
        h: Tensor,
        p: Tensor,
        x: Tensor,
        instruction: Tensor,
        edge_index: Tensor,
        edge_type: Tensor,
        edge_graph: Tensor,
    ) -> Tensor:
        """h [N, C], p [N], x [R+1, 2, C], instruction [B, K, C] and indices of facts to [N, C]."""
        if self.per_fact:
            relation = [self.relation(x[edge_type, direction]) for direction in (0, 1)]
        else:
            table = self.relation(x)
            relation = [table[edge_type, direction] for direction in (0, 1)]
        features = [h]
        for k in range(instruction.shape[1]):
            gate = instruction[edge_graph, k]
            for direction, index in enumerate((edge_index, edge_index.flip(0))):
                features.append(self.message(p, index, relation[direction], gate))
        return torch.relu(self.update(torch.cat(features, dim=-1)))


class PackedPyGReaRev(nn.Module):
    """`Retriever`'s mathematics without the collapsed layer, over a PyG batch.

    Args:
        config: sizes. Dropout must be 0.
        text_dim: width of the token states.
        per_fact: see `Layer`.

    Raises:
        ValueError: dropout is not 0.
    """

    def __init__(self, config: RetrieverConfig, text_dim: int, *, per_fact: bool = False) -> None:
        super().__init__()
        if config.dropout:
            raise ValueError(f"PackedPyGReaRev: retriever.dropout is {config.dropout}, set it to 0")
        width, count = config.hidden_dim, config.num_instructions
        self.num_stages = config.num_stages
        self.pooling = TokenPooling(text_dim, width)
        self.instructions = InstructionStack(width, count, 0.0)
        self.start = nn.Linear(width, width)
        self.self_relation = nn.Parameter(torch.empty(width))
        self.layers = nn.ModuleList(
            Layer(width, count, per_fact=per_fact) for _ in range(config.num_reasoning_steps)
        )
        self.node_score = nn.Linear(width, 1)
        self.revision = InstructionRevision(width, count)
        self.fact_score = nn.Linear(3 * width, 1)

    def forward(self, batch: Batch, relations: RelationStates) -> Tensor:
        """Fact logits, float32 [E]."""
        head, tail = batch.edge_index
        rows, edge_type = torch.unique(batch.edge_type, return_inverse=True)
        query = self.pooling.relation_query
        texts = (2 * rows[:, None] + torch.arange(2, device=rows.device)).flatten()
        length = relations.ptr.diff()[texts]
        token = torch.arange(int(length.max()), device=rows.device)
        mask = token < length[:, None]
        # Where the mask is False, any token does.
        states = relations.states[(relations.ptr[texts][:, None] + token) * mask]
        x = self.pooling.pool(states, mask, query).unflatten(0, (-1, 2))
        instruction = self.instructions(self.pooling, batch.question, batch.question_mask)

        rows, num_nodes = self.start(x[:, 0])[edge_type], batch.num_nodes
        h = torch.relu(scatter(rows, tail, 0, num_nodes) + scatter(rows, head, 0, num_nodes))

        loops = torch.arange(num_nodes, device=head.device)
        edge_index = torch.cat([batch.edge_index, loops.expand(2, -1)], dim=1)
        # Self-loops have one more relation, whose vector is learned.
        all_types = torch.cat([edge_type, torch.full_like(loops, x.shape[0])])
        with_self = torch.cat([x, self.self_relation.expand(1, 2, -1)])
        edge_graph = batch.batch[edge_index[0]]
        topic = (batch.topic > 0).to(h.dtype).unsqueeze(1)
        for stage in range(self.num_stages):
            if stage:
                instruction = self.revision(instruction, global_add_pool(h * topic, batch.batch))
            p = batch.topic
            for layer in self.layers:
                h = layer(h, p, with_self, instruction, edge_index, all_types, edge_graph)
                p = softmax(self.node_score(h).squeeze(1), batch.batch, num_nodes=batch.num_graphs)
        facts = torch.cat([h[head], x[edge_type, 0], h[tail]], dim=-1)
        return self.fact_score(facts).squeeze(1)


def pyg_batch(questions: list[Data]) -> Batch:
    """PyG's collation, with the questions' token states padded to the longest."""
    batch = Batch.from_data_list(questions, exclude_keys=["states"])
    texts = [question.states for question in questions]
    batch.question = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    length = torch.tensor([len(text) for text in texts])
    batch.question_mask = torch.arange(int(length.max())) < length.unsqueeze(1)
    facts = torch.tensor([0, *(question.num_edges for question in questions)])
    batch.fact_ptr = facts.cumsum(0).int()
    return batch
