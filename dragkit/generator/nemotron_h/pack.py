"""Sequences end to end: what the blocks that look at other tokens need to keep them apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Pack(NamedTuple):
    """B sequences of T tokens in all, one after the other, with no padding between them.

    Attributes:
        position: int32 [T] place of each token in its sequence, from 0.
        sequence: int64 [T] sequence of each token.
        ptr: int32 [B+1] where the sequences begin and end.
        longest: tokens of a sequence at most; a host integer, so that nothing waits for a device.
    """

    position: Tensor
    sequence: Tensor
    ptr: Tensor
    longest: int


def make_pack(length: Tensor, total: int, longest: int) -> Pack:
    """The pack of sequences of the given lengths.

    Args:
        length: int64 [B] tokens of each sequence.
        total: T, their sum; longest: not less than any of them.
    """
    sequence = torch.repeat_interleave(length, output_size=total)
    end = length.cumsum(0)
    position = torch.arange(total, device=length.device) - (end - length)[sequence]
    ptr = torch.cat([end.new_zeros(1), end]).int()
    return Pack(position.int(), sequence, ptr, longest)


def pad_to_multiple(embeds: Tensor, pack: Pack, multiple: int) -> tuple[Tensor, Pack]:
    """The same pack with one more sequence of zeros, so that T is a multiple of `multiple`.

    Buffers of few sizes are what a compiled block and a CUDA graph can be made for.

    Args:
        embeds: float [T, M]; pack: of its tokens; multiple: 1 changes nothing.
    """
    total = embeds.shape[0]
    padding = -total % multiple
    if padding == 0:
        return embeds, pack
    embeds = torch.cat([embeds, embeds.new_zeros(padding, embeds.shape[1])])
    place = torch.arange(padding, device=embeds.device)
    end = torch.full((padding,), pack.ptr.shape[0] - 1, device=embeds.device)
    ptr = torch.cat([pack.ptr, pack.ptr.new_full((1,), total + padding)])
    return embeds, Pack(
        torch.cat([pack.position, place.int()]),
        torch.cat([pack.sequence, end]),
        ptr,
        max(pack.longest, padding),
    )


def split_by_tokens(lengths: Sequence[int], tokens: int | None, count: int) -> list[int]:
    """How many of the sequences, in their order, make each pass.

    Args:
        lengths: of the sequences; tokens, count: of a pass, at most; None is no limit. A sequence
            that is longer is alone in its pass.
    """
    sizes: list[int] = []
    tokens = sum(lengths) if tokens is None else tokens
    room = 0
    for length in lengths:
        if not sizes or length > room or sizes[-1] == count:
            sizes.append(0)
            room = tokens
        sizes[-1] += 1
        room -= length
    return sizes
