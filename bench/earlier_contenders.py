"""The training loops of the earlier implementation, rewritten from its description.

Phase 1 runs one question at a time. It builds the graph from string triples at every access, draws
Gaussian node features, encodes the relation texts of each question, projects per edge in a small
graph attention network, and computes a ranking matrix. Phase 2 assembles prompts fact by fact with
a tokeniser call each, pads them within a micro-batch, computes logits of the whole vocabulary at
every token, and updates after every micro-batch. Where the description leaves a choice, this file
takes the faster one. The generator is ours, so that only the training differs.
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

_GRAD_CLIP, _LR = 1.0, 1e-5
_RHO, _MARGIN = 0.7, 1.0


class StringGraph(NamedTuple):
    """One question's graph: float [N, C], int64 [2, E], R strings, int64 [E] and float [E]."""

    features: Tensor
    edge_index: Tensor
    relations: tuple[str, ...]
    edge_type: Tensor
    label: Tensor


def string_graph(question: dict, width: int) -> StringGraph:
    """The graph of a raw question, by dictionaries over its strings."""
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
    """Graph attention whose scores, but not values, depend on relation and instruction."""

    def __init__(self, width: int, num_heads: int = 4) -> None:
        super().__init__(aggr="add", node_dim=0)
        self.num_heads = num_heads
        for name in ("query", "condition", "key", "value", "relation", "output"):
            self.add_module(name, nn.Linear(width, width))

    def forward(
        self, x: Tensor, edge_index: Tensor, relation: Tensor, instruction: Tensor
    ) -> Tensor:
        """float [N, C], int64 [2, E], float [E, C], float [1, C] to float [N, C]."""
        messages = self.propagate(edge_index, x=x, relation=relation, instruction=instruction)
        return torch.relu(self.output(messages) + x)

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
        """float [E, C]. Every projection runs after the gather, edge by edge."""
        shape = (-1, self.num_heads, x_i.shape[1] // self.num_heads)
        query = (self.query(x_i) + self.condition(instruction)).view(shape)
        key = (self.key(x_j) + self.relation(relation)).view(shape)
        score = (query * key).sum(-1) / shape[2] ** 0.5
        weight = softmax(score, index, ptr, size_i)
        return (weight.unsqueeze(-1) * self.value(x_j).view(shape)).flatten(1)


class EarlierOutput(NamedTuple):
    """Of one question's facts: probabilities float [E], states float [E, 3C], labels float [E]."""

    probability: Tensor
    fact: Tensor
    label: Tensor


class EarlierRetriever(nn.Module):
    """Attention layers, one instruction that a GRU updates, and a linear score of every fact.

    Args:
        width: C of all states.
        num_layers: number of attention layers.
    """

    def __init__(self, width: int = 256, num_layers: int = 3) -> None:
        super().__init__()
        from sentence_transformers import SentenceTransformer

        # A list hides the encoder's weights from this module's parameters.
        self._encoder = [SentenceTransformer(str(find_encoder()), device="cpu")]
        text_dim = self._encoder[0].encode(["width"], show_progress_bar=False).shape[1]
        self.width = width
        self.relation_map = nn.Sequential(
            nn.Linear(text_dim, width), nn.ReLU(), nn.Linear(width, width)
        )
        self.question_map = nn.Linear(text_dim, width)
        self.layers = nn.ModuleList(InstructionAttention(width) for _ in range(num_layers))
        self.update = nn.GRUCell(width, width)
        self.score = nn.Linear(3 * width, 1)
        self.cache: dict[tuple[str, ...], Tensor] = {}

    def _encode(self, texts: Sequence[str]) -> Tensor:
        options = {"convert_to_tensor": True, "show_progress_bar": False}
        # `encode` returns inference tensors, which autograd does not accept. The clone is none.
        return self._encoder[0].encode(list(texts), **options).clone()

    # Without gradients, so the earlier implementation never trains `relation_map`.
    @torch.no_grad()
    def encode_relations(self, names: tuple[str, ...]) -> Tensor:
        """Vectors of a question's relations, float [R, C], cached by the tuple of their strings."""
        if names not in self.cache:
            self.cache[names] = self.relation_map(self._encode(names))
        return self.cache[names]

    @torch.no_grad()
    def encode_question(self, text: str) -> Tensor:
        """Sentence vector of a question, float [1, D], cached by its string."""
        key = ("question", text)
        if key not in self.cache:
            self.cache[key] = self._encode([text])
        return self.cache[key]

    def forward(self, question: dict) -> EarlierOutput:
        """Probabilities of one question's facts."""
        graph = string_graph(question, self.width)
        relation = self.encode_relations(graph.relations)[graph.edge_type]
        instruction = self.question_map(self.encode_question(question["question"]))
        h = graph.features
        for layer in self.layers:
            h = layer(h, graph.edge_index, relation, instruction)
            weight = torch.softmax(h @ instruction.squeeze(0), dim=0)
            instruction = self.update((weight.unsqueeze(0) @ h), instruction)
        head, tail = graph.edge_index
        fact = torch.cat([h[head], relation, h[tail]], dim=-1)
        return EarlierOutput(torch.sigmoid(self.score(fact)).squeeze(1), fact, graph.label)


def earlier_retrieval_loss(output: EarlierOutput) -> Tensor:
    """BCE on probabilities, and the hinge over all pairs of a positive and a negative fact."""
    probability, label = output.probability, output.label
    bce = F.binary_cross_entropy(probability, label)
    positive, negative = probability[label > 0.5], probability[label <= 0.5]
    if positive.numel() == 0 or negative.numel() == 0:
        return _RHO * bce
    hinge = torch.relu(_MARGIN - (positive.unsqueeze(1) - negative.unsqueeze(0))).mean()
    return _RHO * bce + (1 - _RHO) * hinge


class EarlierRetrieverLoop:
    """Phase 1: one optimizer step per batch of questions."""

    tally: Tally | None = None

    def __init__(self, retriever: EarlierRetriever) -> None:
        self.retriever = retriever
        self.optimizer = torch.optim.AdamW(retriever.parameters(), lr=_LR, weight_decay=1e-3)

    def step(self, questions: Sequence[dict]) -> float:
        """Trains on raw questions. Returns their mean loss."""
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
    """Phase 2, around our generator: one optimizer step per micro-batch.

    Args:
        retriever: of phase 1.
        generator: with its adapters.
        k_facts: maximum number of facts in a prompt.
        max_answers: maximum number of answers in a target.
        projector_dim: hidden width of the projector.
        tally: counts the tokens.
        microbatch: questions per optimizer step.
    """

    def __init__(
        self,
        retriever: EarlierRetriever,
        generator: Generator,
        *,
        k_facts: int,
        max_answers: int,
        projector_dim: int,
        tally: Tally,
        microbatch: int = 4,
    ) -> None:
        self.retriever, self.generator = retriever, generator
        self.template = PromptTemplate()
        self.projector = nn.Sequential(
            nn.Linear(3 * retriever.width, projector_dim),
            nn.ReLU(),
            nn.Linear(projector_dim, generator.dim),
        )
        self.k_facts, self.max_answers, self.microbatch = k_facts, max_answers, microbatch
        self.clipped = [*self.retriever.parameters(), *self.projector.parameters()]
        adapters = [p for p in generator.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW([*self.clipped, *adapters], lr=_LR, weight_decay=1e-3)
        self.num_facts = self.num_prompts = 0
        self.tally = tally

    def _select(self, output: EarlierOutput) -> tuple[Tensor, Tensor]:
        """At most k facts, by a two-class Gumbel-Softmax, and their straight-through masks."""
        # The earlier implementation converts logits to probabilities, and back to logits here.
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
        """Token ids int64 [A] and embeddings float [A, M] of one text, by a tokeniser call."""
        ids = torch.tensor(self.generator.tokenize([text])[0], dtype=torch.int64)
        return ids, self.generator.model.get_input_embeddings()(ids)

    def prompt(
        self, question: dict, chosen: Tensor, vectors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings up to the last fact [F, M], of cue and target [A, M], and labels int64 [A]."""
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
        """Mean loss of the micro-batch from full-vocabulary logits over the padded sequences.

        As in the description, shorter lists of facts are filled with pairs of a zero vector and a
        newline's embedding, which are attended to. The sequences are then padded on the right.
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

    def _step(self, questions: Sequence[dict]) -> float:
        self.optimizer.zero_grad()
        prompts, retrieval = [], torch.zeros(())
        for question in questions:
            output = self.retriever(question)
            chosen, mask = self._select(output)
            vectors = self.projector(output.fact[chosen]) * mask.unsqueeze(1)
            prompts.append(self.prompt(question, chosen, vectors))
            retrieval = retrieval + earlier_retrieval_loss(output) / len(questions)
            self.num_facts += len(chosen)
            self.num_prompts += 1
        for front, back, label in prompts:
            self.tally.tokens += len(front) + len(back)
            self.tally.supervised += int((label >= 0).sum())
        loss = self.generator_loss(prompts) + 0.1 * retrieval
        loss.backward()
        # The earlier implementation does not clip the adapters.
        nn.utils.clip_grad_norm_(self.clipped, _GRAD_CLIP)
        self.optimizer.step()
        return loss.item()

    def step(self, questions: Sequence[dict]) -> float:
        """Trains on raw questions, a micro-batch at a time. Returns the mean loss."""
        size = self.microbatch
        losses = [self._step(questions[i : i + size]) for i in range(0, len(questions), size)]
        return sum(losses) / len(losses)
