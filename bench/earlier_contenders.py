"""The earlier implementation's way of training, written again from its description.

Phase 1 runs one question at a time: graphs built from string triples at every access, Gaussian node
features, relation texts through the sentence encoder question by question, a small graph attention
network whose projections run per edge, and a ranking matrix. Phase 2 puts prompts together fact by
fact with a tokeniser call each, pads them within a micro-batch, computes logits of the whole
vocabulary at every token, and updates after every micro-batch. Where the description leaves a
choice, the faster one was taken. The generator is ours, so that only the way of training differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import softmax

from bench.measure import Tally
from dragkit.generator.generator import Generator
from dragkit.generator.prompt import PromptTemplate
from dragkit.retriever.text_encoder import find_encoder

_GRAD_CLIP = 1.0
_RHO, _MARGIN = 0.7, 1.0


class StringGraph(NamedTuple):
    """One question's graph, built at every access.

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
    for row, (head, _, tail) in enumerate(question["triples"]):
        if frozenset((head, tail)) in on_path:
            label[row] = 1.0
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
        """float [E, C]; every projection is applied after the gather, edge by edge."""
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
        """Empties the caches of encoded texts, as at the start of the first epoch."""
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
    """Phase 1 of the earlier implementation: one optimizer step per batch of questions."""

    def __init__(self, retriever: EarlierRetriever, lr: float = 1e-5) -> None:
        self.retriever = retriever
        self.optimizer = torch.optim.AdamW(retriever.parameters(), lr=lr, weight_decay=1e-3)

    def step(self, questions: Sequence[dict]) -> float:
        """Trains on raw questions and returns their mean loss."""
        self.optimizer.zero_grad()
        total = 0.0
        for question in questions:
            loss = earlier_retrieval_loss(self.retriever(question)) / len(questions)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.retriever.parameters(), _GRAD_CLIP)
        self.optimizer.step()
        return total


class EarlierJointLoop:
    """Phase 2 of the earlier implementation, around a generator of ours.

    Args:
        generator: with its adapters; hidden: width of the projector.
        k_facts, max_answers: most facts in a prompt and answers in a target.
        microbatch: questions per optimizer step; lr: learning rate.
    """

    def __init__(
        self,
        retriever: EarlierRetriever,
        generator: Generator,
        *,
        k_facts: int,
        max_answers: int,
        hidden: int,
        microbatch: int = 4,
        lr: float = 1e-5,
    ) -> None:
        self.retriever, self.generator = retriever, generator
        self.template = PromptTemplate()
        self.projector = nn.Sequential(
            nn.Linear(3 * retriever.width, hidden), nn.ReLU(), nn.Linear(hidden, generator.dim)
        )
        self.k_facts, self.max_answers, self.microbatch = k_facts, max_answers, microbatch
        self.heads = [*self.retriever.parameters(), *self.projector.parameters()]
        adapters = [p for p in generator.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW([*self.heads, *adapters], lr=lr, weight_decay=1e-3)
        self.facts_used = self.prompts_made = 0
        self.tally = Tally()

    def _select(self, output: EarlierOutput) -> tuple[Tensor, Tensor]:
        """Facts drawn by two-class Gumbel-Softmax, capped, with their straight-through masks."""
        p = output.probability
        logits = torch.stack([(p + 1e-8).log(), (1 - p + 1e-8).log()], dim=-1)
        noise = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-9, 1 - 1e-7)))
        soft = torch.softmax((logits + noise) / 0.5, dim=-1)[:, 0]
        hard = (soft > 0.5).float()
        chosen = hard.nonzero().squeeze(1)
        if chosen.numel() == 0:
            chosen = soft.argmax().unsqueeze(0)
        chosen = chosen[torch.argsort(soft[chosen], descending=True)][: self.k_facts]
        return chosen, (hard - soft.detach() + soft)[chosen]

    def _embed(self, text: str) -> tuple[Tensor, Tensor]:
        """Token ids and embeddings of one piece of text: a tokeniser call and a copy each."""
        ids = torch.tensor(self.generator.tokenize([text])[0], dtype=torch.int64)
        return ids, self.generator.model.get_input_embeddings()(ids)

    def prompt(
        self, question: dict, chosen: Tensor, vectors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Facts, then cue with target, and the latter's labels: float [F, M], [A, M], int64 [A]."""
        tokenizer, template = self.generator.tokenizer, self.template
        embed = self.generator.model.get_input_embeddings()
        pieces = []
        if tokenizer.bos_token_id is not None:
            pieces.append(embed(torch.tensor([tokenizer.bos_token_id])))
        pieces.append(self._embed(template.prefix(question["question"]))[1])
        for row, fact in enumerate(chosen.tolist()):
            head, relation, tail = question["triples"][fact]
            words = " ".join(relation.split(".")[-2:]).replace("_", " ")
            pieces.append(vectors[row : row + 1])
            pieces.append(self._embed(template.fact(head, words, tail))[1])
        _, cue = self._embed(template.cue)
        answers = question["answer"][: self.max_answers]
        target_ids, target = self._embed(template.target(answers))
        end = torch.tensor([self.generator.eos_token_id])
        labels = torch.cat([torch.full((len(cue),), -100), target_ids, end])
        return torch.cat(pieces), torch.cat([cue, target, embed(end)]), labels

    def generator_loss(self, prompts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """Mean loss of the microbatch from full-vocabulary logits over the padded sequences.

        Shorter facts parts are filled with zero vectors that each carry a newline's embedding, and
        attended to, as the description has it; what is left is padded on the right.
        """
        longest = max(len(front) for front, _, _ in prompts)
        _, newline = self._embed("\n")
        filler = torch.stack([torch.zeros_like(newline[0]), newline[0]])
        rows, labels = [], []
        for front, back, label in prompts:
            missing = longest - len(front)
            padding = filler.repeat((missing + 1) // 2, 1)[:missing]
            rows.append(torch.cat([front, padding, back]))
            labels.append(torch.cat([torch.full((longest,), -100), label]))
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(r)) for r in rows], batch_first=True)
        return self.generator.model(
            inputs_embeds=nn.utils.rnn.pad_sequence(rows, batch_first=True),
            attention_mask=mask.long(),
            labels=nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
            use_cache=False,
        ).loss

    def _microbatch(self, questions: Sequence[dict]) -> float:
        self.optimizer.zero_grad()
        prompts, retrieval = [], torch.zeros(())
        for question in questions:
            output = self.retriever(question)
            chosen, mask = self._select(output)
            vectors = self.projector(output.fact[chosen]) * mask.unsqueeze(1)
            prompts.append(self.prompt(question, chosen, vectors))
            retrieval = retrieval + earlier_retrieval_loss(output) / len(questions)
            self.facts_used += len(chosen)
            self.prompts_made += 1
        for front, back, label in prompts:
            self.tally.tokens += len(front) + len(back)
            self.tally.supervised += int((label >= 0).sum())
        loss = self.generator_loss(prompts) + 0.1 * retrieval
        loss.backward()
        nn.utils.clip_grad_norm_(self.heads, _GRAD_CLIP)
        self.optimizer.step()
        return loss.item()

    def step(self, questions: Sequence[dict]) -> float:
        """Trains on raw questions, an optimizer step per microbatch; returns the mean loss."""
        size = self.microbatch
        parts = [questions[i : i + size] for i in range(0, len(questions), size)]
        return sum(self._microbatch(part) for part in parts) / len(parts)
