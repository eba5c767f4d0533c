"""Packs: sequences without padding between them, and the offsets that keep them apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pack(NamedTuple):
    """B sequences of T tokens in all, one after the other.

    Attributes:
        position: int32 [T] index of each token in its sequence.
        sequence: int64 [T] sequence of each token.
        ptr: int32 [B+1] sequence b is the tokens ptr[b] to ptr[b+1] - 1.
        longest: upper bound on the tokens of a sequence, known on the host without a copy.
        gate: float [T] in (0, 1] weight with which other tokens read a token: a factor of its
            exp(score) in attention and of its dt in Mamba-2. None is 1 for all. A gate near 0
            hides a token from all but the causal convolutions.
    """

    position: Tensor
    sequence: Tensor
    ptr: Tensor
    longest: int
    gate: Tensor | None = None


def make_pack(length: Tensor, total: int, longest: int) -> Pack:
    """The pack of sequences of the given lengths.

    Args:
        length: int64 [B] tokens of each sequence.
        total: T, the sum of `length`.
        longest: an upper bound on `length`.
    """
    # With `output_size` the host does not wait for the sum of the lengths.
    sequence = torch.repeat_interleave(length, output_size=total)
    end = length.cumsum(0)
    position = torch.arange(total, device=length.device) - (end - length)[sequence]
    ptr = torch.cat([end.new_zeros(1), end]).int()
    return Pack(position.int(), sequence, ptr, longest)


def pad_to_multiple(embeds: Tensor, pack: Pack, multiple: int) -> tuple[Tensor, Pack]:
    """Appends a sequence of zeros, so that T is a multiple of `multiple`.

    Compiled blocks and CUDA graphs then meet few distinct sizes.

    Args:
        embeds: float [T, M].
        pack: the pack of these tokens.
    """
    total = embeds.shape[0]
    padding = -total % multiple
    if padding == 0:
        return embeds, pack
    embeds = torch.cat([embeds, embeds.new_zeros(padding, embeds.shape[1])])
    # The padding is a separate sequence, so no other token reads it.
    position = torch.arange(padding, device=embeds.device)
    sequence = torch.full((padding,), pack.ptr.shape[0] - 1, device=embeds.device)
    ptr = torch.cat([pack.ptr, pack.ptr.new_full((1,), total + padding)])
    gate = pack.gate if pack.gate is None else F.pad(pack.gate, (0, padding), value=1.0)
    return embeds, Pack(
        torch.cat([pack.position, position.int()]),
        torch.cat([pack.sequence, sequence]),
        ptr,
        max(pack.longest, padding),
        gate,
    )


def split_by_tokens(
    lengths: Sequence[int], max_tokens: int | None, max_sequences: int
) -> list[int]:
    """Cuts sequences, in their order, into micro-batches. Returns the sequences of each.

    A sequence that is longer than `max_tokens` is a micro-batch by itself.

    Args:
        lengths: tokens of each sequence.
        max_tokens, max_sequences: bounds on a micro-batch. None is no bound.
    """
    sizes: list[int] = []
    max_tokens = sum(lengths) if max_tokens is None else max_tokens
    remaining = 0
    for length in lengths:
        if not sizes or length > remaining or sizes[-1] == max_sequences:
            sizes.append(0)
            remaining = max_tokens
        sizes[-1] += 1
        remaining -= length
    return sizes
