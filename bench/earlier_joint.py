"""The earlier implementation's joint training, made again from its description.

Retrieval question by question, prompts put together fact by fact with a tokeniser call each, padded
within a microbatch, logits of the whole vocabulary at every place, an update per microbatch. The
generator is ours, so that only the way of training differs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.baselines import GRAD_CLIP, EarlierOutput, EarlierRetriever, earlier_retrieval_loss
from bench.measure import Tally
from dragkit.generator.generator import Generator
from dragkit.generator.prompt import PromptTemplate


class EarlierJointLoop:
    """Phase 2 of the earlier implementation, around a generator of ours.

    Args:
        generator: with its adapters; width: C of the retriever.
        k_facts, max_answers: most facts in a prompt and answers in a target.
        hidden: width of the projector; microbatch: questions per optimizer step; lr: rate.
    """

    def __init__(
        self,
        generator: Generator,
        width: int = 256,
        k_facts: int = 10,
        max_answers: int = 50,
        hidden: int = 128,
        microbatch: int = 4,
        lr: float = 1e-5,
    ) -> None:
        self.retriever = EarlierRetriever(width)
        self.generator = generator
        self.template = PromptTemplate()
        self.projector = nn.Sequential(
            nn.Linear(3 * width, hidden), nn.ReLU(), nn.Linear(hidden, generator.dim)
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
        for place, fact in enumerate(chosen.tolist()):
            head, relation, tail = question["triples"][fact]
            words = " ".join(relation.split(".")[-2:]).replace("_", " ")
            pieces.append(vectors[place : place + 1])
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
        nn.utils.clip_grad_norm_(self.heads, GRAD_CLIP)
        self.optimizer.step()
        return loss.item()

    def step(self, questions: Sequence[dict]) -> float:
        """Trains on raw questions, an optimizer step per microbatch; returns the mean loss."""
        size = self.microbatch
        parts = [questions[i : i + size] for i in range(0, len(questions), size)]
        return sum(self._microbatch(part) for part in parts) / len(parts)
