"""Answer loss of a question for every subset of a few facts, and its gradients at the gates.

A gate scales a fact's structural vector. A log-gate weighs all tokens of a fact where others read
them, see `Pack.gate` of the generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dragkit.data.packed import QuestionBatch
from dragkit.generator.prompt import NeuralPrompt, PromptLayout
from dragkit.joint import JointModel
from dragkit.retriever.text_encoder import RelationStates

# Prompts of a pass. More would not fit the cache of a processor.
_CHUNK = 32


def all_subsets(num_facts: int) -> Tensor:
    """bool [2^n, n]: row s is the subset whose fact i is bit i of s."""
    subset = torch.arange(2**num_facts).unsqueeze(1)
    return (subset >> torch.arange(num_facts)) & 1 > 0


def subset_number(drawn: Tensor) -> Tensor:
    """int64 [...] row of `all_subsets` of each subset, bool [..., n]."""
    return (drawn.long() << torch.arange(drawn.shape[-1])).sum(-1)


class SubsetTables(NamedTuple):
    """Tables of a question with n facts, the most probable first. Gradients are float64.

    Attributes:
        logits: float64 [n].
        label: bool [n] whether a fact is positive.
        loss: [2^n] answer loss in nats.
        vector_gate: [2^n, n] gradient at the gates of the vectors. A fact outside the subset has 0.
        log_gate: [2^n, n] gradient at log-gates of 1. A fact outside the subset has 0.
        num_tokens: [2^n] tokens of the prompt.
        mean_field: [n] gradient at the log-gates sigmoid(l), with all facts in the prompt.
        soft: temperature T -> [D, n] gradient at the logits through the log-gates
            sigmoid(key / T) of random draws, with all facts in the prompt.
        key_order_loss: [2, D] loss of random draws, with facts by key and by logit.
    """

    logits: Tensor
    label: Tensor
    loss: Tensor
    vector_gate: Tensor
    log_gate: Tensor
    num_tokens: Tensor
    mean_field: Tensor
    soft: dict[float, Tensor]
    key_order_loss: Tensor


class QuestionPrompts:
    """Prompts of one question around subsets of n of its facts.

    Half of the n facts, at most, are the positive facts with the largest logits. The others are the
    facts with the largest logits among the rest.

    Args:
        model: the joint model, in evaluation mode and without trainable parameters.
        batch: one question.
        relations: token states of the relations.
        num_facts: n. A question with fewer facts has all of them.
    """

    def __init__(
        self, model: JointModel, batch: QuestionBatch, relations: RelationStates, num_facts: int
    ) -> None:
        self.model, self.batch = model, batch
        with torch.no_grad():
            output = model.retriever(batch, relations)
            logits, label = output.fact_logits, batch.graph.label > 0
            ranking = logits.argsort(descending=True, stable=True)
            positive = ranking[label[ranking]][: num_facts // 2]
            others = ranking[~torch.isin(ranking, positive)][: num_facts - len(positive)]
            chosen = ranking[torch.isin(ranking, torch.cat([positive, others]))]
            self.facts = chosen.int()
            self.logits, self.label = logits[chosen], label[chosen]
            self.vectors = model.projector(output, batch.graph, self.facts)

    def _prompt(self, local: Tensor, gate: Tensor | None = None) -> tuple[NeuralPrompt, Tensor]:
        layout = self.layout(local)
        lengths = layout.copy_lengths().result()
        prompt = layout.assemble(range(len(local)), *lengths, gate)
        return prompt, self.vectors[local.clamp(min=0)].flatten(0, 1)

    def layout(self, local: Tensor) -> PromptLayout:
        """Prompts around facts, int64 [S, K] numbers below n. -1 means no fact."""
        index = torch.where(local >= 0, self.facts[local.clamp(min=0)], -1)
        # The subsets are draws of a single question.
        return self.model.layout(self.batch, index.int().unsqueeze(1), with_target=True)

    def fits(self) -> bool:
        """Whether a prompt holds all n facts."""
        piece = self.layout(torch.arange(len(self.facts)).unsqueeze(0)).end.diff()
        return bool((piece[0, : len(self.facts)] > 0).all())

    @torch.no_grad()
    def losses(self, local: Tensor) -> Tensor:
        """Losses of prompts, float64 [S], by the forward of training."""
        losses = []
        for rows in local.split(_CHUNK):
            losses.append(self.model.generator(*self._prompt(rows)).prompt_loss)
        return torch.cat(losses).double()

    def gradients(self, local: Tensor, gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gradients at the vector gates, which are 1, and at the log-gates.

        Args:
            local: int64 [S, K] facts of the prompts, see `layout`.
            gate: float [S, K] log-gates. None is 1.

        Returns:
            Two tensors, float64 [S, K], with 0 where there is no fact.
        """
        gate = torch.ones(local.shape) if gate is None else gate.float()
        chunks = zip(local.split(_CHUNK), gate.split(_CHUNK), strict=True)
        parts = zip(*(self._gradients(*chunk) for chunk in chunks), strict=True)
        at_vector, at_fact = (torch.cat(part).double() for part in parts)
        return at_vector, at_fact

    def _gradients(self, local: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        gate = gate.clone().requires_grad_()
        prompt, vectors = self._prompt(local, gate)
        vectors.requires_grad_()
        loss = self.model.generator(prompt, vectors).loss_sum
        at_vectors, at_gate = torch.autograd.grad(loss, [vectors, gate])
        at_vector = (at_vectors * vectors.detach()).sum(1).view_as(gate)
        present = local >= 0
        return at_vector * present, at_gate * present


def _by_logit(drawn: Tensor) -> Tensor:
    """int64 [S, n] the facts of each subset, bool [S, n], in the order of logits, then -1."""
    n = drawn.shape[1]
    fact = torch.where(drawn, torch.arange(n), n).sort(dim=1).values
    return torch.where(fact < n, fact, -1)


def _by_fact(local: Tensor, value: Tensor, num_facts: int) -> Tensor:
    """Moves values [S, K] of the facts `local` to the columns of these facts, [S, n]."""
    table = value.new_zeros(len(local), num_facts + 1)
    return table.scatter(1, torch.where(local >= 0, local, num_facts), value)[:, :-1]


def make_tables(
    question: QuestionPrompts, *, num_draws: int, temperatures: Sequence[float], seed: int
) -> SubsetTables:
    """All tables of a question, see `SubsetTables`. Random draws are a function of `seed`."""
    logits, n = question.logits.double(), len(question.facts)
    drawn = all_subsets(n)
    local = _by_logit(drawn)
    to_facts = partial(_by_fact, local, num_facts=n)
    at_vector, at_fact = question.gradients(local)
    uniform = torch.rand(
        num_draws, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    key = logits + uniform.logit(eps=1e-12)
    fires = key > 0
    # An empty draw takes the largest key.
    fires |= ~fires.any(1, keepdim=True) & (key == key.amax(1, keepdim=True))
    every_fact = torch.arange(n).repeat(num_draws, 1)
    soft = {}
    for temperature in temperatures:
        gate = torch.sigmoid(key / temperature)
        at_gate = question.gradients(every_fact, gate)[1]
        soft[temperature] = at_gate * gate * (1 - gate) / temperature
    by_key = key.argsort(1, descending=True)
    by_key = torch.where(fires.gather(1, by_key), by_key, -1)
    key_order = torch.stack([question.losses(by_key), question.losses(_by_logit(fires))])
    return SubsetTables(
        logits=logits,
        label=question.label,
        loss=question.losses(local),
        vector_gate=to_facts(at_vector),
        log_gate=to_facts(at_fact),
        num_tokens=question.layout(local).end[:, -1],
        mean_field=question.gradients(every_fact[:1], logits.sigmoid().unsqueeze(0))[1][0],
        soft=soft,
        key_order_loss=key_order,
    )
