"""The earlier implementation's way of training, made again from its description.

Phase 1, one question at a time: graphs built from string triples at every access, Gaussian node
features, relation texts through the sentence encoder question by question, a small graph attention
network whose projections run per edge, and a ranking matrix. Where the description leaves a choice,
the faster one was taken. Phase 2 is in `bench.earlier_joint`, the packed opponent in
`bench.pyg_rearev`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import softmax

from dragkit.retriever.text_encoder import find_encoder

GRAD_CLIP = 1.0
_RHO, _MARGIN = 0.7, 1.0


class StringGraph(NamedTuple):
    """One question's graph, built anew at every access.

    Attributes:
        features: float [N, C]; edge_index: int64 [2, E]; relations: distinct strings, R of them;
        edge_type: int64 [E]; label: float [E].
    """

    features: Tensor
    edge_index: Tensor
    relations: tuple[str, ...]
    edge_type: Tensor
    label: Tensor


def string_graph(question: dict, width: int) -> StringGraph:
    """Nodes, edges and labels of a raw question, by dictionaries over its strings."""
    node: dict[str, int] = {}
    relation: dict[str, int] = {}
    edges, types = [], []
    for head, name, tail in question["triples"]:
        for entity in (head, tail):
            node.setdefault(entity, len(node))
        edges.append((node[head], node[tail]))
        types.append(relation.setdefault(name, len(relation)))
    on_path = {
        frozenset(path[i : i + 2]) for path in question["paths"] for i in range(len(path) - 1)
    }
    label = torch.zeros(len(edges))
    for place, (head, _, tail) in enumerate(question["triples"]):
        if frozenset((head, tail)) in on_path:
            label[place] = 1.0
    return StringGraph(
        features=torch.randn(len(node), width) * 0.02,
        edge_index=torch.tensor(edges, dtype=torch.int64).t().contiguous(),
        relations=tuple(relation),
        edge_type=torch.tensor(types, dtype=torch.int64),
        label=label,
    )


class InstructionAttention(MessagePassing):
    """Graph attention of four heads whose score sees relation and instruction; values do not."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__(aggr="add", node_dim=0)
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.condition = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.relation = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(
        self, x: Tensor, edge_index: Tensor, relation: Tensor, instruction: Tensor
    ) -> Tensor:
        """float [N, C], int64 [2, E], float [E, C], float [1, C] to float [N, C]."""
        total = self.propagate(edge_index, x=x, relation=relation, instruction=instruction)
        return torch.relu(self.output(total) + x)

    def message(
        self,
        x_i: Tensor,
        x_j: Tensor,
        relation: Tensor,
        instruction: Tensor,
        index: Tensor,
        ptr: Tensor | None,
        size_i: int | None,
    ) -> Tensor:
        """float [E, C]; every projection is applied behind the gather, edge by edge."""
        shape = (-1, self.heads, x_i.shape[1] // self.heads)
        query = (self.query(x_i) + self.condition(instruction)).view(shape)
        key = (self.key(x_j) + self.relation(relation)).view(shape)
        score = (query * key).sum(-1) / shape[2] ** 0.5
        weight = softmax(score, index, ptr, size_i)
        return (weight.unsqueeze(-1) * self.value(x_j).view(shape)).flatten(1)


class EarlierOutput(NamedTuple):
    """Probabilities, float [E], and representations, float [E, 3C], of one question's facts."""

    probability: Tensor
    fact: Tensor
    label: Tensor


class EarlierRetriever(nn.Module):
    """Three attention layers; one instruction, updated by a GRU; a linear score on probabilities.

    Args:
        width: C of all states; layers: how many.
    """

    def __init__(self, width: int = 256, layers: int = 3) -> None:
        super().__init__()
        from sentence_transformers import SentenceTransformer

        # In a list, so that its weights are no parameters of this model.
        self._encoder = [SentenceTransformer(str(find_encoder()), device="cpu")]
        text_dim = self._encoder[0].encode(["width"], show_progress_bar=False).shape[1]
        self.width = width
        self.relation_map = nn.Sequential(
            nn.Linear(text_dim, width), nn.ReLU(), nn.Linear(width, width)
        )
        self.question_map = nn.Linear(text_dim, width)
        self.layers = nn.ModuleList(InstructionAttention(width) for _ in range(layers))
        self.update = nn.GRUCell(width, width)
        self.score = nn.Linear(3 * width, 1)
        self.relation_cache: dict[tuple[str, ...], Tensor] = {}
        self.question_cache: dict[str, Tensor] = {}

    def forget(self) -> None:
        """Empties the caches, as at the start of the first epoch."""
        self.relation_cache.clear()
        self.question_cache.clear()

    def _encode(self, texts: Sequence[str]) -> Tensor:
        return (
            self._encoder[0]
            .encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
            .clone()
        )

    @torch.no_grad()
    def relations(self, names: tuple[str, ...]) -> Tensor:
        """Vectors of a question's relations, float [R, C]; kept by the tuple of their strings."""
        if names not in self.relation_cache:
            self.relation_cache[names] = self.relation_map(self._encode(names))
        return self.relation_cache[names]

    @torch.no_grad()
    def question(self, text: str) -> Tensor:
        """Sentence vector of a question, float [1, D]."""
        if text not in self.question_cache:
            self.question_cache[text] = self._encode([text])
        return self.question_cache[text]

    def forward(self, question: dict) -> EarlierOutput:
        """Probabilities of one question's facts."""
        graph = string_graph(question, self.width)
        relation = self.relations(graph.relations)[graph.edge_type]
        instruction = self.question_map(self.question(question["question"]))
        h = graph.features
        for layer in self.layers:
            h = layer(h, graph.edge_index, relation, instruction)
            weight = torch.softmax(h @ instruction.squeeze(0), dim=0)
            instruction = self.update((weight.unsqueeze(0) @ h), instruction)
        head, tail = graph.edge_index
        fact = torch.cat([h[head], relation, h[tail]], dim=-1)
        return EarlierOutput(torch.sigmoid(self.score(fact)).squeeze(1), fact, graph.label)


def earlier_retrieval_loss(output: EarlierOutput) -> Tensor:
    """BCE on probabilities and the hinge over the whole matrix of positives and negatives."""
    probability, label = output.probability, output.label
    bce = F.binary_cross_entropy(probability, label)
    positive, negative = probability[label > 0.5], probability[label <= 0.5]
    if positive.numel() == 0 or negative.numel() == 0:
        return _RHO * bce
    hinge = torch.relu(_MARGIN - (positive.unsqueeze(1) - negative.unsqueeze(0))).mean()
    return _RHO * bce + (1 - _RHO) * hinge


class EarlierRetrieverLoop:
    """Phase 1 of the earlier implementation: a loop over questions, one optimizer step per batch.

    Args:
        width: C; lr: learning rate.
    """

    def __init__(self, width: int = 256, lr: float = 1e-5) -> None:
        self.model = EarlierRetriever(width)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=1e-3)

    def step(self, questions: Sequence[dict]) -> float:
        """Trains on raw questions and returns their mean loss."""
        self.optimizer.zero_grad()
        total = 0.0
        for question in questions:
            loss = earlier_retrieval_loss(self.model(question)) / len(questions)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
        self.optimizer.step()
        return total
