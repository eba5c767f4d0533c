"""The neural prompt: the text it is made of, its layout in pieces, and its assembly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dragkit.data.packed import TokenPack
from dragkit.data.tokens import ANSWER_DELIMITER
from dragkit.generator.to_host import AsyncToHost, to_device
from dragkit_kernels import prompt_tokens


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """The pieces of text of a prompt, each tokenised on its own (D-RAG, appendix C).

    A prompt is `prefix`, then one `fact` line per drawn fact, each behind one structural slot, then
    `cue`; training appends `target`, whose end token the tokeniser's owner adds.
    """

    instruction: str = "Answer the question based on the provided facts."
    cue: str = "\nAnswer:"

    def prefix(self, question: str) -> str:
        """Everything in front of the facts."""
        return f"{self.instruction}\n\nQuestion: {question}\n\nProvided facts:\n\n"

    def fact(self, head: str, relation: str, tail: str) -> str:
        """The line of one fact; `relation` is the relation's text, not its raw name."""
        return f"{head}, {relation}, {tail}\n"

    def target(self, answers: Sequence[str]) -> str:
        """The supervised continuation: all gold answers as one delimited list."""
        return " " + ANSWER_DELIMITER.join(answers)


@dataclass(frozen=True, slots=True)
class NeuralPrompt:
    """G prompts end to end, with no padding between them.

    Attributes:
        input_ids: int32 [L] token ids; 0 where a structural vector stands.
        slot: int32 [L] row of the batch's structural vectors at this token, -1 for text.
        position: int32 [L] index of the token within its own prompt.
        question: int64 [L] prompt of the token.
        ptr: int32 [G+1] where the prompts begin and end.
        target_row: int64 [A] tokens whose successor is supervised.
        target_id: int64 [A] that successor.
        kept: int64 [G] facts that fitted.
        longest: tokens of a prompt at most, known without looking at the device.
    """

    input_ids: Tensor
    slot: Tensor
    position: Tensor
    question: Tensor
    ptr: Tensor
    target_row: Tensor
    target_id: Tensor
    num_facts_kept: Tensor
    longest: int

    @property
    def length(self) -> Tensor:
        """int64 [G] tokens of each prompt."""
        return self.ptr.diff().long()


@dataclass(frozen=True, slots=True)
class PromptLayout:
    """What B prompts are made of: pieces of text, some behind a structural vector.

    The pieces of a prompt are its prefix, one for each of K facts, the residual slot, the cue and
    the target; what is absent is empty. Which facts were drawn decides how long prompts are, so
    their lengths are on the device. The host asks for them once (`copy_lengths`) to assemble them.

    Attributes:
        source: int32 [W] token ids of all text.
        start: int32 [B, K+4] where a piece's text begins in `source`.
        end: int32 [B, K+4] where the piece ends in its prompt.
        slot: int32 [B, K+4] the vector in front of its text, -1 for none.
        kept: int64 [B] facts that fitted.
    """

    source: Tensor
    start: Tensor
    end: Tensor
    slot: Tensor
    num_facts_kept: Tensor

    def copy_lengths(self) -> AsyncToHost:
        """Begins to copy the tokens of each prompt, and how many are supervised: int32 [2, B]."""
        length = self.end[:, -1]
        return AsyncToHost(torch.stack([length, length - self.end[:, -2]]))

    def assemble(
        self, questions: Sequence[int], lengths: Sequence[int], supervised: Sequence[int]
    ) -> NeuralPrompt:
        """Some of the prompts end to end, without waiting for the device.

        Args:
            questions: which, in their order; slots still point into the vectors of all.
            lengths, supervised: of all B prompts, as `copy_lengths` has them.
        """
        device, chosen = self.source.device, np.asarray(questions, dtype=np.int64)
        length, goal = (np.asarray(x, dtype=np.int64)[chosen] for x in (lengths, supervised))
        ptr = np.concatenate([np.zeros(1, dtype=np.int64), length.cumsum()])
        # The row before a supervised token predicts it.
        shift = ptr[1:] - goal - 1 - (goal.cumsum() - goal)
        row = np.arange(goal.sum()) + np.repeat(shift, goal)
        index, begin, target_row = to_device(device, chosen, ptr, row)
        begin = begin.int()
        tokens = prompt_tokens(
            self.source,
            self.start,
            self.end,
            self.slot,
            index.int(),
            ptr=begin,
            num_tokens=int(ptr[-1]),
        )
        return NeuralPrompt(
            input_ids=tokens.ids,
            slot=tokens.slot,
            position=tokens.position,
            question=tokens.sequence.long(),
            ptr=begin,
            target_row=target_row,
            target_id=tokens.ids.index_select(0, target_row + 1).long(),
            num_facts_kept=self.num_facts_kept.index_select(0, index),
            longest=int(length.max(initial=0)),
        )


def _row_lengths(pack: TokenPack) -> Tensor:
    return pack.ptr[1:] - pack.ptr[:-1]


def layout_prompts(
    prefix: TokenPack,
    facts: TokenPack,
    cue: Tensor,
    target: TokenPack | None,
    index: Tensor,
    *,
    max_tokens: int,
    vectors: bool = True,
    residual: bool = False,
) -> PromptLayout:
    """Prefix, facts, cue and target of every question in their order; nothing waits.

    Facts that would push a prompt over `max_tokens` are left out from the last (lowest) up; prefix,
    cue and target always stay whole.

    Args:
        prefix: B token rows.
        facts: E token rows, one per fact of the pack.
        cue: int32 [Q] tokens behind the facts.
        target: B token rows with their end token, or None when generating.
        index: int32 [B, K] selected facts, best first, -1 for none.
        max_tokens: bound on the tokens of one prompt, target included.
        vectors: put one structural slot before each fact's text: row `b * K + k` of the vectors.
        residual: append one more slot behind the facts, row `B * K + b`, for the residual vector.
    """
    batch, capacity = index.shape
    ones = torch.ones((batch, 1), dtype=torch.int32, device=index.device)
    present, row = index >= 0, index.clamp(min=0)
    if facts.ptr.shape[0] > 1:
        fact_start, fact_length = facts.ptr[row], _row_lengths(facts)[row] + int(vectors)
    else:
        fact_start = fact_length = torch.zeros_like(row)
    fact_length = torch.where(present, fact_length, 0)
    texts = [prefix.ids, facts.ids, cue]
    bases = [0, prefix.ids.shape[0], prefix.ids.shape[0] + facts.ids.shape[0]]
    target_start = target_length = 0 * ones
    if target is not None:
        texts.append(target.ids)
        target_start = target.ptr[:-1, None] + (bases[2] + cue.shape[0])
        target_length = _row_lengths(target)[:, None]
    prefix_length = _row_lengths(prefix)[:, None]
    fixed = prefix_length + target_length + (cue.shape[0] + int(residual))
    fits = present & (fact_length.cumsum(1) + fixed <= max_tokens)
    lengths = [
        prefix_length,
        torch.where(fits, fact_length, 0),
        int(residual) * ones,
        cue.shape[0] * ones,
        target_length,
    ]
    starts = [prefix.ptr[:-1, None], fact_start + bases[1], 0 * ones, bases[2] * ones, target_start]
    number = torch.arange(batch * (capacity + 1), dtype=torch.int32, device=index.device)
    slot = torch.full((batch, capacity + 4), -1, dtype=torch.int32, device=index.device)
    if vectors:
        slot[:, 1 : capacity + 1] = number[: batch * capacity].view(batch, capacity)
    if residual:
        slot[:, capacity + 1] = number[batch * capacity :]
    return PromptLayout(
        source=torch.cat(texts),
        start=torch.cat(starts, 1),
        end=torch.cat(lengths, 1).cumsum(1, dtype=torch.int32),
        slot=slot,
        num_facts_kept=fits.sum(1),
    )
