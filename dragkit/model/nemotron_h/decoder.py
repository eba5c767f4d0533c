"""The blocks of a Nemotron-H over packs: a training pass, and prefill and step of decoding."""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dragkit.model.nemotron_h.attention import attention_at, packed_attention
from dragkit.model.nemotron_h.backends import MambaOps
from dragkit.model.nemotron_h.lora import adapted_linear
from dragkit.model.nemotron_h.mixer import MambaState, mamba_mixer, mamba_step
from dragkit.model.nemotron_h.pack import Pack
from dragkit_kernels import gated_rms_norm

_SEES_OTHER_TOKENS = ("linear_attention", "full_attention")
# Rows for which calling our norm costs more than its faster passes save.
_FEW = 256
_Mixer = Callable[[nn.Module, Tensor], Tensor]
# `generator.checkpointing` -> kinds of blocks that keep their input alone and compute again.
RECOMPUTED: dict[str, tuple[str, ...]] = {
    "none": (),
    "mamba": ("linear_attention",),
    "all": ("linear_attention", "full_attention", "moe", "mlp"),
}


class KeyValues(NamedTuple):
    """Keys and values of B sequences: float [B, G, S, D] each, and int64 [B] tokens in use."""

    key: Tensor
    value: Tensor
    length: Tensor


State = MambaState | KeyValues


def computes(config: object) -> bool:
    """Whether the functions here compute what a model of this configuration does."""
    if getattr(config, "model_type", None) != "nemotron_h":
        return False
    return not getattr(config, "attention_dropout", 0.0) and config.mamba_hidden_act == "silu"


def _norm(norm: nn.Module, hidden: Tensor) -> Tensor:
    if hidden.shape[0] <= _FEW and not torch.is_grad_enabled():
        return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
    return gated_rms_norm(hidden, None, norm.weight, groups=1, eps=norm.variance_epsilon)


def _project(mixer: nn.Module, names: str, hidden: Tensor) -> tuple[Tensor, ...]:
    """Some of query, key and value ("qkv"), each [..., its heads, D]."""
    projected = adapted_linear(hidden, [getattr(mixer, f"{name}_proj") for name in names])
    return tuple(x.unflatten(-1, (-1, mixer.head_dim)) for x in projected)


def _joined(mixer: nn.Module, heads: Tensor) -> Tensor:
    return adapted_linear(heads.flatten(-2), [mixer.o_proj])[0]


def _feed_forward(mixer: nn.Module, hidden: Tensor) -> Tensor:
    (up,) = adapted_linear(hidden, [mixer.up_proj])
    return adapted_linear(mixer.act_fn(up), [mixer.down_proj])[0]


def _change(block: nn.Module, hidden: Tensor, mamba: _Mixer, attention: _Mixer) -> Tensor:
    """What a block adds to the hidden states, float [T, M]."""
    normed, kind, mixer = _norm(block.norm, hidden), block.block_type, block.mixer
    if kind == "linear_attention":
        return mamba(mixer, normed)
    if kind == "full_attention":
        return attention(mixer, normed)
    if kind == "mlp":
        return _feed_forward(mixer, normed)
    return mixer(normed[None]).squeeze(0)  # the library's experts take three axes


def _changed(
    block: nn.Module, hidden: Tensor, mamba: _Mixer, attention: _Mixer, recompute: Container[str]
) -> Tensor:
    """`_change`; a block of a kind in `recompute` keeps `hidden` alone for its backward pass."""
    if block.block_type not in recompute or not torch.is_grad_enabled():
        return _change(block, hidden, mamba, attention)
    return checkpoint(_change, block, hidden, mamba, attention, use_reentrant=False)


def _pass(
    model: nn.Module,
    embeds: Tensor,
    rows: Tensor,
    mamba: _Mixer,
    attend: Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None], Tensor],
    recompute: Container[str] = (),
) -> Tensor:
    """Last hidden states at some tokens; nothing is computed that they do not depend on.

    From the last block on in which tokens see one another, only the wanted ones are computed.
    """
    kinds = [block.block_type for block in model.layers]
    last = max((i for i, kind in enumerate(kinds) if kind in _SEES_OTHER_TOKENS), default=-1)

    def attention(mixer: nn.Module, hidden: Tensor) -> Tensor:
        query, key, value = _project(mixer, "qkv", hidden)
        return _joined(mixer, attend(mixer, query, key, value, None))

    def attention_of_rows(mixer: nn.Module, hidden: Tensor) -> Tensor:
        key, value = _project(mixer, "kv", hidden)
        (query,) = _project(mixer, "q", hidden[rows])
        return _joined(mixer, attend(mixer, query, key, value, rows))

    hidden = embeds if last >= 0 else embeds[rows]
    for index, block in enumerate(model.layers):
        # Finding out which sequence wants which rows would stop a GPU, which is fast at all rows.
        if index == last and kinds[index] == "full_attention" and hidden.device.type == "cpu":
            change = _changed(block, hidden, mamba, attention_of_rows, recompute)
            hidden = hidden[rows] + change
            continue
        hidden = hidden + _changed(block, hidden, mamba, attention, recompute)
        if index == last:
            hidden = hidden[rows]
    return _norm(model.norm_f, hidden)


def _attend(
    mixer: nn.Module, query: Tensor, key: Tensor, value: Tensor, rows: Tensor | None, pack: Pack
) -> Tensor:
    """Attention of all tokens, or of those that `query` holds."""
    if rows is None:
        return packed_attention(query, key, value, pack, mixer.scaling)
    return attention_at(query, key, value, pack, rows, mixer.scaling)


def hidden_at_rows(
    model: nn.Module,
    embeds: Tensor,
    pack: Pack,
    rows: Tensor,
    ops: MambaOps,
    recompute: Container[str] = (),
) -> Tensor:
    """Last hidden states at some tokens, with gradients.

    Args:
        model: a `NemotronHModel`, with adapters or without.
        embeds: float [T, M]; pack: of the tokens.
        rows: int64 [A] wanted tokens; ops: of the Mamba-2 layers.
        recompute: kinds of blocks that are computed again in the backward pass, of `RECOMPUTED`.

    Returns:
        float [A, M].
    """

    def mamba(mixer: nn.Module, hidden: Tensor) -> Tensor:
        return mamba_mixer(mixer, hidden, pack, ops)[0]

    return _pass(model, embeds, rows, mamba, partial(_attend, pack=pack), recompute)


def prefill(
    model: nn.Module, embeds: Tensor, pack: Pack, ops: MambaOps, room: int
) -> tuple[Tensor, list[State]]:
    """Hidden states at the last tokens, and what the blocks remember of all.

    Args:
        model, embeds, pack, ops: as above; every sequence has a token.
        room: tokens that will follow in each sequence.

    Returns:
        float [B, M], and a state per block in which tokens see one another, in order.
    """
    states: list[State] = []
    last, length = pack.ptr[1:].long() - 1, pack.ptr.diff().long()
    rows = len(last)
    place = pack.sequence * (pack.longest + room) + pack.position

    def mamba(mixer: nn.Module, hidden: Tensor) -> Tensor:
        change, state = mamba_mixer(mixer, hidden, pack, ops, last)
        states.append(state)
        return change

    def kept(x: Tensor) -> Tensor:
        flat = x.new_zeros(rows * (pack.longest + room), *x.shape[1:])
        flat = flat.index_copy_(0, place, x).unflatten(0, (rows, -1))
        return flat.transpose(1, 2).contiguous()

    def attend(
        mixer: nn.Module, query: Tensor, key: Tensor, value: Tensor, wanted: Tensor | None
    ) -> Tensor:
        states.append(KeyValues(kept(key), kept(value), length.clone()))
        return _attend(mixer, query, key, value, wanted, pack)

    return _pass(model, embeds, last, mamba, attend), states


def _attention_step(mixer: nn.Module, hidden: Tensor, *, state: KeyValues) -> Tensor:
    query, key, value = _project(mixer, "qkv", hidden)
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
    return _joined(mixer, heads.flatten(1, 2))


def step(model: nn.Module, embeds: Tensor, states: list[State]) -> Tensor:
    """Hidden states of one more token of every sequence; the states move on in place.

    Args:
        model: as above; embeds: float [B, M]; states: of `prefill`.

    Returns:
        float [B, M].
    """
    remembered = iter(states)
    hidden = embeds
    for block in model.layers:
        state = next(remembered) if block.block_type in _SEES_OTHER_TOKENS else None
        mamba = partial(mamba_step, state=state)
        hidden = hidden + _change(block, hidden, mamba, partial(_attention_step, state=state))
    return _norm(model.norm_f, hidden)
