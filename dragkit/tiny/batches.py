"""Packs of invented questions in the prompt layout of phase 2."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dragkit.generator.nemotron_h.pack import Pack, make_pack
from dragkit.generator.prompt import PromptTemplate
from dragkit.tiny.tasks import Sample
from dragkit.tiny.tokenizer import BOS, EOS, NEUTRAL, PAD

IGNORE_INDEX = -100
Slots = Literal["marked", "neutral", "empty", "none"]


@dataclass(frozen=True, slots=True)
class Batch:
    """A pack of B rows with T tokens in all. The first token of a row is never supervised.

    Attributes:
        input_ids: int64 [T].
        labels: int64 [T], the token where it is supervised, else -100.
        scale: float32 [T], factor on the token's embedding. It is 1 for text.
        is_slot: bool [T], True at structural slots.
        pack: boundaries of the rows.
    """

    input_ids: Tensor
    labels: Tensor
    scale: Tensor
    is_slot: Tensor
    pack: Pack


@dataclass(slots=True)
class Row:
    """Token ids of one prompt under construction."""

    ids: list[int]
    labels: list[int]
    slots: list[int]
    slot_scale: float = 1.0

    def append(self, ids: Sequence[int], *, supervised: bool = False) -> None:
        """Appends tokens as context, or as supervised tokens."""
        self.ids.extend(ids)
        self.labels.extend(ids if supervised else [IGNORE_INDEX] * len(ids))


def collate(rows: Sequence[Row]) -> Batch:
    """Packs rows into one batch."""
    lengths = [len(row.ids) for row in rows]
    pack = make_pack(torch.tensor(lengths), sum(lengths), max(lengths))
    input_ids, labels = (
        torch.tensor([item for row in rows for item in getattr(row, name)])
        for name in ("ids", "labels")
    )
    scale = torch.ones(len(input_ids))
    is_slot = torch.zeros(len(input_ids), dtype=torch.bool)
    for row, start in zip(rows, pack.ptr.tolist(), strict=False):
        slots = [start + slot for slot in row.slots]
        scale[slots] = row.slot_scale
        is_slot[slots] = True
    return Batch(input_ids, labels, scale, is_slot, pack)


class PromptWriter:
    """Writes samples as rows with a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.template = PromptTemplate()
        self.bos = tokenizer.token_to_id(BOS)
        self.eos = tokenizer.token_to_id(EOS)
        self.pad = tokenizer.token_to_id(PAD)
        self.neutral = tokenizer.token_to_id(NEUTRAL)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt(self, sample: Sample, slots: Slots, markers: Sequence[str] = ()) -> Row:
        """Writes the prompt of a question with supervised answers.

        Args:
            sample: the question.
            slots: content of the slot before each fact: its marker ("marked"), the neutral token
                ("neutral"), a zero vector ("empty"), or nothing ("none").
            markers: markers to write instead of the sample's right ones.
        """
        # A factor of 0 turns the slot's embedding into the zero vector.
        row = Row([self.bos], [IGNORE_INDEX], [], 0.0 if slots == "empty" else 1.0)
        row.append(self.encode(self.template.prefix(sample.question)))
        self._facts(row, sample, slots, markers or sample.markers)
        self._answer(row, sample)
        return row

    def _facts(self, row: Row, sample: Sample, slots: Slots, markers: Sequence[str]) -> None:
        for fact, marker in zip(sample.facts, markers, strict=True):
            if slots != "none":
                row.slots.append(len(row.ids))
                token = self.tokenizer.token_to_id(marker) if slots == "marked" else self.neutral
                row.append([token])
            row.append(self.encode(self.template.fact(*fact)))

    def _answer(self, row: Row, sample: Sample) -> None:
        row.append(self.encode(self.template.cue))
        row.append([*self.encode(self.template.target(sample.answers)), self.eos], supervised=True)

    def drill(self, sample: Sample) -> Row:
        """Writes marked facts and their answers without a question."""
        row = Row([self.bos], [IGNORE_INDEX], [])
        self._facts(row, sample, "marked", sample.markers)
        self._answer(row, sample)
        return row

    def several_questions(self, samples: Sequence[Sample]) -> Row:
        """Writes the facts of all samples, then each question with its answers."""
        row = Row([self.bos], [IGNORE_INDEX], [])
        for sample in samples:
            self._facts(row, sample, "none", sample.markers)
        for sample in samples:
            row.append(self.encode(f"\nQuestion: {sample.question}\n"))
            self._answer(row, sample)
        return row


def induction_row(rng: random.Random, ids: Sequence[int], length: int, repeats: int) -> Row:
    """Writes random tokens, then repeats them in blocks whose order changes each time."""
    first = rng.choices(ids, k=length)
    row = Row(list(first), [IGNORE_INDEX] * length, [])
    for _ in range(repeats):
        size = rng.randint(3, 6)
        blocks = [first[start : start + size] for start in range(0, length, size)]
        rng.shuffle(blocks)
        for block in blocks:
            # No earlier token predicts the first token of a block, so it is context.
            row.append(block[:1])
            row.append(block[1:], supervised=True)
    return row
