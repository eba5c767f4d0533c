"""Decoding with a Nemotron-H: prefill over a pack, then one token of every sequence per step."""

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
    """Key-value cache of one block.

    Attributes:
        key, value: float [B, G, S, D], with room for S tokens in each of B sequences.
        length: int64 [B] tokens in use.
    """

    key: Tensor
    value: Tensor
    length: Tensor


State = MambaState | KeyValues


@dataclass(frozen=True, kw_only=True)
class PrefillMixing(PackedMixing):
    """`PackedMixing` that also appends the state of every block to `states`.

    Attributes:
        last: int64 [B] last token of every sequence.
        length: int64 [B] tokens of every sequence.
        cache_row: int64 [T] row of each token in a cache of B times `cache_len` rows.
    """

    last: Tensor
    length: Tensor
    cache_row: Tensor
    cache_len: int
    states: list[State]

    def mamba(self, mixer: nn.Module, hidden: Tensor) -> Tensor:
        output, state = mamba_mixer(mixer, hidden, self.pack, self.ops, self.last)
        self.states.append(state)
        return output

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        # Each block advances its own length, so each gets a copy.
        self.states.append(KeyValues(self._cache(key), self._cache(value), self.length.clone()))
        return super().attend(query, key, value, scale)

    def _cache(self, x: Tensor) -> Tensor:
        rows = len(self.length)
        flat = x.new_zeros(rows * self.cache_len, *x.shape[1:])
        flat = flat.index_copy_(0, self.cache_row, x).unflatten(0, (rows, -1))
        return flat.transpose(1, 2).contiguous()


def prefill(
    model: nn.Module, embeds: Tensor, pack: Pack, ops: MambaOps, max_new_tokens: int
) -> tuple[Tensor, list[State]]:
    """Hidden states at the last tokens, and the states to continue from.

    Args:
        model, embeds, pack, ops: see `hidden_at_rows`. Every sequence has at least one token.
        max_new_tokens: tokens for which the key-value caches have room.

    Returns:
        float [B, M], and one state per block of `TOKEN_MIXING_TYPES`, in the model's order.
    """
    cache_len = pack.longest + max_new_tokens
    mixing = PrefillMixing(
        pack,
        ops,
        last=pack.ptr[1:].long() - 1,
        length=pack.ptr.diff().long(),
        cache_row=pack.sequence * cache_len + pack.position,
        cache_len=cache_len,
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
    max_tokens: int | None,
    all_reduce_max: Callable[[int], int] | None = None,
) -> tuple[Tensor, list[State]]:
    """`prefill` in micro-batches. The host waits once, for the lengths.

    Args:
        model, embeds, ops, max_new_tokens: see `prefill`.
        length: int64 [B] tokens of every sequence.
        max_tokens: tokens of a micro-batch. None puts all sequences into one.
        all_reduce_max: largest value over the ranks that gather weights together. All of them
            run as many passes as the rank with the most micro-batches.
    """
    lengths = length.tolist()
    sizes = split_by_tokens(lengths, max_tokens, len(lengths))
    num_passes = len(sizes) if all_reduce_max is None else all_reduce_max(len(sizes))
    hidden, states, start = [], [], 0
    for part in length.split(sizes):
        total = sum(lengths[start : start + len(part)])
        rows, embeds = embeds.tensor_split([total])
        # All micro-batches take the same longest length, so that their caches concatenate.
        pack = make_pack(part, total, max(lengths))
        part_hidden, part_states = prefill(model, rows, pack, ops, max_new_tokens)
        hidden.append(part_hidden)
        states.append(part_states)
        start += len(part)
    # The other ranks still gather weights, and this rank has to take part.
    for _ in range(num_passes - len(sizes)):
        prefill(model, rows, pack, ops, max_new_tokens)
    return torch.cat(hidden), _concatenate(states)


def _concatenate(microbatches: list[list[State]]) -> list[State]:
    """States of all sequences, block by block. Empties the lists of `microbatches`."""
    if len(microbatches) == 1:
        return microbatches[0]
    states = []
    while microbatches[0]:
        # Popping frees the parts of a block before the next block is concatenated.
        parts = [part.pop(0) for part in microbatches]
        states.append(type(parts[0])(*map(torch.cat, zip(*parts, strict=True))))
    return states


@dataclass(frozen=True)
class DecodeMixing:
    """One token of every sequence reads the state of a block. See `TokenMixing`."""

    state: State | None
    rows: None = None

    def mamba(self, mixer: nn.Module, hidden: Tensor) -> Tensor:
        return mamba_step(mixer, hidden, self.state)

    def attention(self, mixer: nn.Module, hidden: Tensor) -> Tensor:
        cache = self.state
        query, key, value = project(mixer, "qkv", hidden)
        row = torch.arange(len(hidden), device=hidden.device)
        cache.key[row, :, cache.length] = key
        cache.value[row, :, cache.length] = value
        cache.length.add_(1)
        column = torch.arange(cache.key.shape[2], device=hidden.device)
        # The rest of the cache is zeros, which a softmax would count.
        unused = (column >= cache.length[:, None])[:, None, None]
        # Plain products: with one query per head, a fused kernel has nothing to save.
        query = query.unflatten(1, (key.shape[1], -1)) * mixer.scaling
        score = (query @ cache.key.mT).masked_fill_(unused, float("-inf"))
        # The softmax runs in float32, as in the fused kernels.
        wide = torch.promote_types(score.dtype, torch.float32)
        heads = score.softmax(-1, dtype=wide).to(query.dtype) @ cache.value
        return merge_heads(mixer, heads.flatten(1, 2))


def decode_step(model: nn.Module, embeds: Tensor, states: list[State]) -> Tensor:
    """Hidden states of the next token of every sequence. Updates the states in place.

    Args:
        model: a `NemotronHModel`.
        embeds: float [B, M].
        states: the states that `prefill` returns.

    Returns:
        float [B, M].
    """
    remaining = iter(states)
    hidden = embeds
    for block in model.layers:
        state = next(remaining) if block.block_type in TOKEN_MIXING_TYPES else None
        hidden = run_block(block, hidden, partial(block_forward, mixing=DecodeMixing(state)))
    return rms_norm(model.norm_f, hidden)
