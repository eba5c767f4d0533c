"""Decoding with a Nemotron-H: prefill over a pack, then one token of every sequence at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dragkit.generator.nemotron_h.backends import MambaOps
from dragkit.generator.nemotron_h.decoder import (
    TOKEN_MIXING_TYPES,
    PackedMixing,
    block_forward,
    merge_heads,
    project,
    rms_norm,
    run_block,
    run_blocks,
)
from dragkit.generator.nemotron_h.mixer import MambaState, mamba_mixer, mamba_step
from dragkit.generator.nemotron_h.pack import Pack, make_pack, split_by_tokens


class KeyValues(NamedTuple):
    """Keys and values of B sequences: float [B, G, S, D] each, and int64 [B] tokens in use."""

    key: Tensor
    value: Tensor
    length: Tensor


State = MambaState | KeyValues


@dataclass(frozen=True, kw_only=True)
class PrefillMixing(PackedMixing):
    """As there; what blocks need to know of the tokens later is added to `states`.

    Attributes:
        last: int64 [B] last token of every sequence; length: int64 [B] their tokens.
        place: int64 [T] of the tokens in B rows of `width`.
    """

    last: Tensor
    length: Tensor
    place: Tensor
    width: int
    states: list[State]

    def mamba(self, mixer: nn.Module, hidden: Tensor) -> Tensor:
        change, state = mamba_mixer(mixer, hidden, self.pack, self.ops, self.last)
        self.states.append(state)
        return change

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.states.append(KeyValues(self._kept(key), self._kept(value), self.length.clone()))
        return super().attend(query, key, value, scale)

    def _kept(self, x: Tensor) -> Tensor:
        rows = len(self.length)
        flat = x.new_zeros(rows * self.width, *x.shape[1:])
        flat = flat.index_copy_(0, self.place, x).unflatten(0, (rows, -1))
        return flat.transpose(1, 2).contiguous()


def prefill(
    model: nn.Module, embeds: Tensor, pack: Pack, ops: MambaOps, max_new_tokens: int
) -> tuple[Tensor, list[State]]:
    """Hidden states at the last tokens, and what the blocks remember of all.

    Args:
        model, embeds, pack, ops: see `hidden_at_rows`; every sequence has a token.
        room: tokens that will follow in each sequence.

    Returns:
        float [B, M], and a state per block in which tokens see one another, in order.
    """
    width = pack.longest + max_new_tokens
    mixing = PrefillMixing(
        pack,
        ops,
        last=pack.ptr[1:].long() - 1,
        length=pack.ptr.diff().long(),
        place=pack.sequence * width + pack.position,
        width=width,
        states=[],
    )
    return run_blocks(model, embeds, mixing.last, mixing), mixing.states


def prefill_in_microbatches(
    model: nn.Module,
    embeds: Tensor,
    length: Tensor,
    ops: MambaOps,
    max_new_tokens: int,
    *,
    tokens: int | None,
    all_reduce_max: Callable[[int], int] | None = None,
) -> tuple[Tensor, list[State]]:
    """As `prefill`, some sequences at a time; waits for the device once, for their lengths.

    Args:
        model, embeds, ops, room: as there; length: int64 [B] tokens of the sequences.
        tokens: of a pass, at most; None is no limit.
        most: of a number on each of the ranks that gather weights together, the largest: all must
            make equally many passes.
    """
    lengths = length.tolist()
    sizes = split_by_tokens(lengths, tokens, len(lengths))
    passes = len(sizes) if all_reduce_max is None else all_reduce_max(len(sizes))
    hidden, states, begin = [], [], 0
    for some in length.split(sizes):
        total = sum(lengths[begin : begin + len(some)])
        rows, embeds = embeds.tensor_split([total])
        # One longest length for all, so that their states can stand side by side.
        pack = make_pack(some, total, max(lengths))
        last, remembered = prefill(model, rows, pack, ops, max_new_tokens)
        hidden.append(last)
        states.append(remembered)
        begin += len(some)
    for _ in range(passes - len(sizes)):
        prefill(model, rows, pack, ops, max_new_tokens)  # for the other ranks alone
    return torch.cat(hidden), _side_by_side(states)


def _side_by_side(passes: list[list[State]]) -> list[State]:
    """States of all sequences, block by block; `passes` give theirs up, lest all be there twice."""
    if len(passes) == 1:
        return passes[0]
    joined_states = []
    while passes[0]:
        parts = [states.pop(0) for states in passes]
        joined_states.append(type(parts[0])(*map(torch.cat, zip(*parts, strict=True))))
    return joined_states


@dataclass(frozen=True)
class DecodeMixing:
    """One token of every sequence sees what is remembered of the others."""

    state: State | None
    rows: None = None

    def mamba(self, mixer: nn.Module, hidden: Tensor) -> Tensor:
        return mamba_step(mixer, hidden, self.state)

    def attention(self, mixer: nn.Module, hidden: Tensor) -> Tensor:
        return _attention_step(mixer, hidden, self.state)


def _attention_step(mixer: nn.Module, hidden: Tensor, state: KeyValues) -> Tensor:
    query, key, value = project(mixer, "qkv", hidden)
    row = torch.arange(len(hidden), device=hidden.device)
    state.key[row, :, state.length] = key
    state.value[row, :, state.length] = value
    state.length.add_(1)
    slot = torch.arange(state.key.shape[2], device=hidden.device)
    unseen = (slot >= state.length[:, None])[:, None, None]
    # Written out: one query a head leaves nothing to the library's kernels.
    query = query.unflatten(1, (key.shape[1], -1)) * mixer.scaling
    score = (query @ state.key.mT).masked_fill_(unseen, float("-inf"))
    wide = torch.promote_types(score.dtype, torch.float32)
    heads = score.softmax(-1, dtype=wide).to(query.dtype) @ state.value
    return merge_heads(mixer, heads.flatten(1, 2))


def decode_step(model: nn.Module, embeds: Tensor, states: list[State]) -> Tensor:
    """Hidden states of one more token of every sequence; the states move on in place.

    Args:
        model: as above; embeds: float [B, M]; states: of `prefill`.

    Returns:
        float [B, M].
    """
    remembered = iter(states)
    hidden = embeds
    for block in model.layers:
        state = next(remembered) if block.block_type in TOKEN_MIXING_TYPES else None
        hidden = run_block(block, hidden, partial(block_forward, mixing=DecodeMixing(state)))
    return rms_norm(model.norm_f, hidden)
