"""The neural prompt: the text a prompt is made of, and its assembly from token rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dragkit.data.packed import TokenPack

ANSWER_DELIMITER = " | "


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
    """B prompts end to end, with no padding between them.

    Attributes:
        input_ids: int64 [L] token ids; 0 where a structural vector stands.
        slot: int64 [L] row of the flattened [B * K] structural vectors at this token, -1 for text.
        position: int64 [L] index of the token within its own prompt.
        question: int64 [L] prompt of the token.
        length: int64 [B] tokens of each prompt.
        target_row: int64 [A] tokens whose successor is supervised.
        target_id: int64 [A] that successor.
        kept: int64 [B] facts that fitted.
        longest: tokens of a prompt at most, known without looking at the device.
    """

    input_ids: Tensor
    slot: Tensor
    position: Tensor
    question: Tensor
    length: Tensor
    target_row: Tensor
    target_id: Tensor
    kept: Tensor
    longest: int


def _row_lengths(pack: TokenPack, device: torch.device) -> Tensor:
    return (pack.ptr[1:] - pack.ptr[:-1]).to(device, torch.int64)


def assemble_prompt(
    prefix: TokenPack,
    facts: TokenPack,
    cue: Tensor,
    target: TokenPack | None,
    index: Tensor,
    *,
    max_tokens: int,
    vectors: bool = True,
    residual: bool = False,
) -> NeuralPrompt:
    """Lays prefix, facts, cue and target of every question end to end, by gathers alone.

    Facts that would push a prompt over `max_tokens` are left out from the last (lowest) up; prefix,
    cue and target always stay whole.

    Args:
        prefix: B token rows.
        facts: E token rows, one per fact of the pack.
        cue: int64 [Q] tokens behind the facts.
        target: B token rows with their end token, or None when generating.
        index: int [B, K] selected facts, best first, -1 for none.
        max_tokens: bound on the tokens of one prompt, target included.
        vectors: put one structural slot before each fact's text.
        residual: append one more slot behind the facts, row `B * K + b`, for the residual vector.

    Returns:
        The packed prompts.
    """
    device = index.device
    batch, capacity = index.shape
    present = index >= 0
    row = index.clamp(min=0).long()
    if facts.ptr.numel() > 1:
        fact_start = facts.ptr.long()[row]
        fact_length = _row_lengths(facts, device)[row] + int(vectors)
    else:
        fact_start = torch.zeros_like(row)
        fact_length = torch.zeros_like(row)
    fact_length = torch.where(present, fact_length, 0)
    prefix_length = _row_lengths(prefix, device)
    target_length = (
        torch.zeros_like(prefix_length) if target is None else _row_lengths(target, device)
    )
    fixed = prefix_length + target_length + cue.numel() + int(residual)
    fits = present & (fact_length.cumsum(1) + fixed[:, None] <= max_tokens)
    fact_length = torch.where(fits, fact_length, 0)

    # One segment per piece; a token finds its piece by repeat_interleave and its id by an offset
    # into the concatenation of all token rows.
    ones = torch.ones_like(prefix_length)
    lengths = torch.cat(
        [
            prefix_length[:, None],
            fact_length,
            (ones * int(residual))[:, None],
            (ones * cue.numel())[:, None],
            target_length[:, None],
        ],
        dim=1,
    )
    # What cannot be left out may alone exceed the bound.
    whole = prefix.max_row + cue.numel() + int(residual) + (0 if target is None else target.max_row)
    longest = max(whole, min(max_tokens, whole + capacity * (facts.max_row + int(vectors))))
    empty = torch.zeros(1, dtype=torch.int64, device=device)
    pieces = [prefix.ids.long(), facts.ids.long(), cue.to(device), empty]
    base_fact = pieces[0].numel()
    base_cue = base_fact + pieces[1].numel()
    base_empty = base_cue + cue.numel()
    base_target = base_empty + 1
    if target is not None:
        pieces.append(target.ids.long())
    source = torch.cat(pieces)
    target_start = (
        torch.zeros_like(prefix_length) if target is None else target.ptr[:-1].long() + base_target
    )
    starts = torch.cat(
        [
            prefix.ptr[:-1].long()[:, None],
            fact_start + (base_fact - int(vectors)),
            (ones * base_empty)[:, None],
            (ones * base_cue)[:, None],
            target_start[:, None],
        ],
        dim=1,
    )
    pieces_per_prompt = capacity + 4
    flat_length = lengths.flatten()
    length = lengths.sum(1)
    segment = torch.repeat_interleave(flat_length)
    within = (
        torch.arange(segment.numel(), device=device)
        - ((flat_length.cumsum(0) - flat_length)[segment])
    )
    piece = segment % pieces_per_prompt
    question = segment // pieces_per_prompt
    is_fact = (piece >= 1) & (piece <= capacity)
    is_slot = is_fact & (within == 0) if vectors else torch.zeros_like(is_fact)
    slot = torch.where(is_slot, question * capacity + piece - 1, -1)
    slot = torch.where(piece == capacity + 1, batch * capacity + question, slot)
    address = starts.flatten()[segment] + within
    ids = torch.where(slot >= 0, 0, source[torch.where(slot >= 0, 0, address)])
    position = torch.arange(segment.numel(), device=device) - (length.cumsum(0) - length)[question]
    supervised = (piece == capacity + 3).nonzero().squeeze(1)
    return NeuralPrompt(
        input_ids=ids,
        slot=slot,
        position=position,
        question=question,
        length=length,
        target_row=supervised - 1,
        target_id=ids[supervised],
        kept=fits.sum(1),
        longest=longest,
    )
