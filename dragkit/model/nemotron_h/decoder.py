"""The blocks of a Nemotron-H in one training pass on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dragkit.model.nemotron_h.attention import attention_at, causal_attention
from dragkit.model.nemotron_h.lora import adapted_linear
from dragkit.model.nemotron_h.mixer import mamba_mixer
from dragkit.model.nemotron_h.norm import rms_norm

_SEES_OTHER_TOKENS = ("linear_attention", "full_attention")


def _project(mixer: nn.Module, names: str, hidden: Tensor) -> tuple[Tensor, ...]:
    """Some of query, key and value ("qkv"), each [..., its heads, D]."""
    projected = adapted_linear(hidden, [getattr(mixer, f"{name}_proj") for name in names])
    return tuple(x.unflatten(-1, (-1, mixer.head_dim)) for x in projected)


def _attention(mixer: nn.Module, hidden: Tensor) -> Tensor:
    query, key, value = _project(mixer, "qkv", hidden)
    mixed = causal_attention(query, key, value, mixer.scaling)
    return adapted_linear(mixed.flatten(-2), [mixer.o_proj])[0]


def _attention_at(mixer: nn.Module, hidden: Tensor, places: list[Tensor]) -> Tensor:
    """The attention mixer at int64 [R] places of each of B rows, end to end: float [A, M]."""
    key, value = _project(mixer, "kv", hidden)
    (query,) = _project(mixer, "q", _gather(hidden, places))
    mixed = [
        attention_at(q, k, v, at, mixer.scaling)
        for q, k, v, at in zip(
            query.split([len(p) for p in places]), key, value, places, strict=True
        )
    ]
    return adapted_linear(torch.cat(mixed).flatten(-2), [mixer.o_proj])[0]


def _gather(hidden: Tensor, places: list[Tensor]) -> Tensor:
    """float [A, M] from [B, L, M]."""
    rows = torch.cat([place + b * hidden.shape[1] for b, place in enumerate(places)])
    return hidden.flatten(0, 1)[rows]


def _feed_forward(mixer: nn.Module, hidden: Tensor) -> Tensor:
    (up,) = adapted_linear(hidden, [mixer.up_proj])
    return adapted_linear(mixer.act_fn(up), [mixer.down_proj])[0]


def computes(config: object) -> bool:
    """Whether `hidden_at_rows` computes what a model of this configuration does in training."""
    kind = getattr(config, "model_type", None)
    return kind == "nemotron_h" and not getattr(config, "attention_dropout", 0.0)


def hidden_at_rows(model: nn.Module, embeds: Tensor, row: Tensor, place: Tensor) -> Tensor:
    """Last hidden states at some tokens; nothing is computed that they do not depend on.

    From the last block on in which tokens see one another, only the wanted ones are computed.

    Args:
        model: a `NemotronHModel`, with adapters or without.
        embeds: float [B, L, M], padded on the right: every layer is causal, so no token sees it.
        row: int64 [A] and place: int64 [A] of the tokens.

    Returns:
        float [A, M].
    """
    order = torch.argsort(row, stable=True)
    places = place[order].split(torch.bincount(row, minlength=len(embeds)).tolist())
    kinds = [block.block_type for block in model.layers]
    last = max((i for i, kind in enumerate(kinds) if kind in _SEES_OTHER_TOKENS), default=-1)

    hidden = embeds if last >= 0 else _gather(embeds, places)
    for index, (kind, block) in enumerate(zip(kinds, model.layers, strict=True)):
        mixer, norm = block.mixer, block.norm
        normed = rms_norm(hidden, norm.weight, norm.variance_epsilon)
        if index == last and kind == "full_attention":
            hidden = _gather(hidden, places) + _attention_at(mixer, normed, places)
            continue
        if kind == "linear_attention":
            change = mamba_mixer(mixer, normed)
        elif kind == "full_attention":
            change = _attention(mixer, normed)
        elif kind == "mlp":
            change = _feed_forward(mixer, normed)
        else:  # the library's experts take three axes
            change = mixer(normed if normed.dim() == 3 else normed[None]).view_as(normed)
        hidden = hidden + change
        if index == last:
            hidden = _gather(hidden, places)
    norm = model.norm_f
    hidden = rms_norm(hidden, norm.weight, norm.variance_epsilon)
    return hidden[torch.argsort(order)]
