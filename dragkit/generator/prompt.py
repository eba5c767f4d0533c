"""The neural prompt: its texts, its layout in pieces, and its assembly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dragkit.data.names import ANSWER_DELIMITER, written_name
from dragkit.data.packed import TokenPack
from dragkit.generator.to_host import AsyncToHost, to_device
from dragkit_kernels import prompt_tokens


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """The texts of a prompt, each tokenised separately (D-RAG, appendix C).

    A prompt is `prefix`, one `fact` line per drawn fact, each after its structural slot, and `cue`.
    Training appends `target` and the end token. Texts of the data are written by `written_name`.
    """

    instruction: str = "Answer the question based on the provided facts."
    cue: str = "\nAnswer:"

    def prefix(self, question: str) -> str:
        """The text before the facts."""
        asked = written_name(question)
        return f"{self.instruction}\n\nQuestion: {asked}\n\nProvided facts:\n\n"

    def fact(self, head: str, relation: str, tail: str) -> str:
        """The line of one fact. `relation` is the relation's text, not its raw name."""
        return ", ".join(map(written_name, (head, relation, tail))) + "\n"

    def target(self, answers: Sequence[str]) -> str:
        """The supervised continuation: all gold answers as one delimited list."""
        return " " + ANSWER_DELIMITER.join(map(written_name, answers))


@dataclass(frozen=True, slots=True)
class NeuralPrompt:
    """G prompts of L tokens in all, one after the other.

    Attributes:
        input_ids: int32 [L] token ids, 0 at a structural slot.
        slot: int32 [L] row of the structural vectors at this token, -1 for text.
        position: int32 [L] index of the token in its prompt.
        question: int64 [L] prompt of the token.
        ptr: int32 [G+1] prompt g is the tokens ptr[g] to ptr[g+1] - 1.
        target_row: int64 [A] tokens whose successor is supervised.
        target_id: int64 [A] that successor.
        longest: upper bound on the tokens of a prompt, known on the host without a copy.
        gate: float [L] gate of each token, see `Pack`. None is 1 for all.
    """

    input_ids: Tensor
    slot: Tensor
    position: Tensor
    question: Tensor
    ptr: Tensor
    target_row: Tensor
    target_id: Tensor
    longest: int
    gate: Tensor | None = None

    @property
    def length(self) -> Tensor:
        """int64 [G] tokens of each prompt."""
        return self.ptr.diff().long()


@dataclass(frozen=True, slots=True)
class PromptLayout:
    """The pieces of P prompts: prefix, K facts, cue and target.

    An absent piece has no tokens. The drawn facts decide the lengths, so these are on the device.
    The host copies them once (`copy_lengths`) before it assembles prompts.

    Attributes:
        text_ids: int32 [W] token ids of all texts.
        text_start: int32 [P, K+3] first token of each piece in `text_ids`.
        end: int32 [P, K+3] end of each piece in its prompt.
        slot: int32 [P, K+3] structural vector before the text of the piece, -1 for none.
        left_out: bool [P, K] selected facts without room in their prompt.
    """

    text_ids: Tensor
    text_start: Tensor
    end: Tensor
    slot: Tensor
    left_out: Tensor

    def copy_lengths(self) -> AsyncToHost:
        """Starts a copy of int32 [2, P]: tokens, and supervised tokens, of each prompt."""
        length = self.end[:, -1]
        return AsyncToHost(torch.stack([length, length - self.end[:, -2]]))

    def assemble(
        self,
        prompts: Sequence[int],
        lengths: Sequence[int],
        supervised: Sequence[int],
        gates: Tensor | None = None,
    ) -> NeuralPrompt:
        """Packs some of the prompts, without waiting for the device.

        Args:
            prompts: prompts to pack, in this order. Their slots index the vectors of all P.
            lengths, supervised: result of `copy_lengths`, for all P prompts.
            gates: float [P, K] gates of the facts, for their slots and texts.
        """
        device, chosen = self.text_ids.device, np.asarray(prompts, dtype=np.int64)
        length, num_targets = (np.asarray(x, dtype=np.int64)[chosen] for x in (lengths, supervised))
        ptr = np.concatenate([np.zeros(1, dtype=np.int64), length.cumsum()])
        # The token before a supervised token predicts it.
        shift = ptr[1:] - num_targets - 1 - (num_targets.cumsum() - num_targets)
        row = np.arange(num_targets.sum()) + np.repeat(shift, num_targets)
        index, device_ptr, target_row = to_device(device, chosen, ptr, row)
        device_ptr = device_ptr.int()
        tokens = prompt_tokens(
            self.text_ids,
            self.text_start,
            self.end,
            self.slot,
            index.int(),
            ptr=device_ptr,
            num_tokens=int(ptr[-1]),
        )
        gate = None
        if gates is not None:
            gate = self._token_gates(gates, index, device_ptr, len(tokens.ids))
        return NeuralPrompt(
            input_ids=tokens.ids,
            slot=tokens.slot,
            position=tokens.position,
            question=tokens.sequence.long(),
            ptr=device_ptr,
            target_row=target_row,
            target_id=tokens.ids.index_select(0, target_row + 1).long(),
            longest=int(length.max(initial=0)),
            gate=gate,
        )

    def _token_gates(self, gates: Tensor, prompts: Tensor, ptr: Tensor, num_tokens: int) -> Tensor:
        """The gates of the tokens of some prompts, float [L]. Tokens outside of facts have 1."""
        end = (self.end[prompts] + ptr[:-1, None]).flatten()
        token = torch.arange(num_tokens, dtype=end.dtype, device=end.device)
        # The first piece that ends after a token holds it. A piece without tokens holds none.
        piece = torch.searchsorted(end, token, right=True)
        return F.pad(gates[prompts], (1, 2), value=1.0).flatten()[piece]


def layout_prompts(
    prefix: TokenPack,
    facts: TokenPack,
    cue: Tensor,
    target: TokenPack | None,
    index: Tensor,
    *,
    max_tokens: int,
    vectors: bool = True,
    text: bool = True,
) -> PromptLayout:
    """Lays out the prompts of a batch. The host does not wait for the device.

    There are P = M * B prompts: prompt m * B + b has the facts of draw m of question b. A fact that
    would push its prompt over `max_tokens` is left out, and the facts after it may still fit.
    Prefix, cue and target always stay whole.

    Args:
        prefix: B token rows.
        facts: E token rows, one per fact of the pack.
        cue: int32 [Q] tokens after the facts.
        target: B token rows with their end token, or None for generation.
        index: int32 [B, K] or [M, B, K] selected facts, best first, -1 for none.
        max_tokens: bound on the tokens of a prompt with its target.
        vectors: whether a slot precedes the text of each fact. Fact k of prompt p has vector
            p * K + k.
        text: whether facts have their text.
    """
    draws, capacity = 1 if index.dim() == 2 else index.shape[0], index.shape[-1]
    index = index.reshape(-1, capacity)
    batch = index.shape[0]
    # Constant columns are multiples of this one, so that no constant is copied to the device.
    ones = torch.ones((batch, 1), dtype=torch.int32, device=index.device)
    # A missing fact reads row 0, and `present` masks what it reads.
    present, row = index >= 0, index.clamp(min=0)
    if facts.ptr.shape[0] > 1:
        fact_start, fact_length = facts.ptr[row], facts.ptr.diff()[row] * text + int(vectors)
    else:
        fact_start = fact_length = torch.zeros_like(row)
    fact_length = torch.where(present, fact_length, 0)
    # `text_ids` joins the texts. These are the offsets of the facts and of the cue in it.
    texts = [prefix.ids, facts.ids, cue]
    fact_offset = prefix.ids.shape[0]
    cue_offset = fact_offset + facts.ids.shape[0]
    target_start = target_length = 0 * ones
    if target is not None:
        texts.append(target.ids)
        target_start = _per_prompt(target.ptr[:-1], draws) + (cue_offset + cue.shape[0])
        target_length = _per_prompt(target.ptr.diff(), draws)
    prefix_length = _per_prompt(prefix.ptr.diff(), draws)
    fixed = prefix_length + target_length + cue.shape[0]
    fits = present
    # Where even the longest rows fit, nothing is left out. The host knows their lengths.
    longest = [prefix.max_row, cue.shape[0], 0 if target is None else target.max_row]
    if sum(longest) + capacity * (facts.max_row * text + int(vectors)) > max_tokens:
        fits = _fitting(fact_length, fixed, max_tokens)
    lengths = [
        prefix_length,
        torch.where(fits, fact_length, 0),
        cue.shape[0] * ones,
        target_length,
    ]
    starts = [
        _per_prompt(prefix.ptr[:-1], draws),
        fact_start + fact_offset,
        cue_offset * ones,
        target_start,
    ]
    slot = torch.full((batch, capacity + 3), -1, dtype=torch.int32, device=index.device)
    if vectors:
        vector = torch.arange(batch * capacity, dtype=torch.int32, device=index.device)
        slot[:, 1 : capacity + 1] = vector.view(batch, capacity)
    return PromptLayout(
        text_ids=torch.cat(texts),
        text_start=torch.cat(starts, 1),
        end=torch.cat(lengths, 1).cumsum(1, dtype=torch.int32),
        slot=slot,
        left_out=present & ~fits,
    )


def _fitting(lengths: Tensor, used: Tensor, max_tokens: int) -> Tensor:
    """Gives room to facts, first come first served.

    Args:
        lengths: int32 [P, K] tokens of each fact.
        used: int32 [P, 1] tokens of the rest of each prompt.
        max_tokens: bound on the tokens of a prompt.

    Returns:
        bool [P, K] facts that find room.
    """
    fits = []
    # What is left for a fact depends on which of those before it were taken.
    for length in lengths.split(1, dim=1):
        total = used + length
        fits.append(total <= max_tokens)
        used = torch.where(fits[-1], total, used)
    return torch.cat(fits, 1)


def _per_prompt(column: Tensor, draws: int) -> Tensor:
    """Repeats a value of each question, [B], for every draw, as a column [M * B, 1]."""
    return column.repeat(draws).unsqueeze(1)
