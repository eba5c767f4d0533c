"""The blocks of a Nemotron-H over packs of tokens."""

from __future__ import annotations

import types
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dragkit.generator.nemotron_h.attention import attention_at, packed_attention
from dragkit.generator.nemotron_h.backends import MambaOps
from dragkit.generator.nemotron_h.experts import routed_forward
from dragkit.generator.nemotron_h.lora import adapted_linear
from dragkit.generator.nemotron_h.mixer import mamba_mixer
from dragkit.generator.nemotron_h.pack import Pack
from dragkit_kernels import gated_rms_norm

TOKEN_MIXING_TYPES = ("linear_attention", "full_attention")
# Rows for which calling our norm costs more than its faster passes save.
_FEW = 256
# Of a block and its input [T, M], the hidden states behind it.
Compute = Callable[[nn.Module, Tensor], Tensor]
# `generator.activation_checkpointing` -> kinds of blocks that keep only their input and are
# recomputed in the backward.
ACTIVATION_CHECKPOINTING: dict[str, tuple[str, ...]] = {
    "none": (),
    "mamba": ("linear_attention",),
    "all": ("linear_attention", "full_attention", "moe", "mlp"),
}


class TokenMixing(Protocol):
    """How tokens of a pass see one another: what the mixers of two kinds of blocks compute.

    Attributes:
        rows: int64 [A] the tokens that a pass goes on with from here on; None is all.
    """

    rows: Tensor | None

    def mamba(self, mixer: nn.Module, hidden: Tensor) -> Tensor: ...

    def attention(self, mixer: nn.Module, hidden: Tensor) -> Tensor: ...


def is_supported(config: object) -> bool:
    """Whether the functions here compute what a model of this configuration does."""
    if getattr(config, "model_type", None) != "nemotron_h":
        return False
    return not getattr(config, "attention_dropout", 0.0) and config.mamba_hidden_act == "silu"


def rms_norm(norm: nn.Module, hidden: Tensor) -> Tensor:
    """What a module of the library normalises, float [T, M]."""
    if not torch.is_grad_enabled() and hidden.shape[0] <= _FEW:
        return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
    return gated_rms_norm(hidden, None, norm.weight, groups=1, eps=norm.variance_epsilon)


def project(mixer: nn.Module, names: str, hidden: Tensor) -> tuple[Tensor, ...]:
    """Some of query, key and value ("qkv"), each [..., its heads, D]."""
    projected = adapted_linear(hidden, [getattr(mixer, f"{name}_proj") for name in names])
    return tuple(x.unflatten(-1, (-1, mixer.head_dim)) for x in projected)


def merge_heads(mixer: nn.Module, heads: Tensor) -> Tensor:
    """The output of attention, float [T, M], from that of its heads, float [T, H, D]."""
    return adapted_linear(heads.flatten(-2), [mixer.o_proj])[0]


def _feed_forward(mixer: nn.Module, hidden: Tensor) -> Tensor:
    (up,) = adapted_linear(hidden, [mixer.up_proj])
    return adapted_linear(mixer.act_fn(up), [mixer.down_proj])[0]


def _mix(
    norm: nn.Module, mixer: nn.Module, kind: str, hidden: Tensor, mixing: TokenMixing
) -> Tensor:
    normed = rms_norm(norm, hidden)
    if kind == "linear_attention":
        return mixing.mamba(mixer, normed)
    if kind == "full_attention":
        return mixing.attention(mixer, normed)
    if kind == "mlp":
        return _feed_forward(mixer, normed)
    return routed_forward(mixer, normed) + _feed_forward(mixer.shared_experts, normed)


def residual_block(
    norm: nn.Module, mixer: nn.Module, kind: str, hidden: Tensor, mixing: TokenMixing
) -> Tensor:
    """Hidden states behind a block of a kind, given by its two parts; see `block_forward`."""
    kept = hidden if mixing.rows is None else hidden[mixing.rows]
    return kept + _mix(norm, mixer, kind, hidden, mixing)


def block_forward(block: nn.Module, hidden: Tensor, mixing: TokenMixing) -> Tensor:
    """Hidden states behind a block, float [T, M], or [A, M] where `mixing` wants rows alone."""
    return residual_block(block.norm, block.mixer, block.block_type, hidden, mixing)


def _forward(
    self: nn.Module, hidden_states: Tensor, compute: Compute | None = None, **kwargs: Any
) -> Tensor:
    if compute is None:
        return type(self).forward(self, hidden_states, **kwargs)
    return compute(self, hidden_states)


def run_block(
    block: nn.Module, hidden: Tensor, compute: Compute, recompute: Container[str] = ()
) -> Tensor:
    """Hidden states behind a block, by a call of the block itself.

    What hangs on a module's call, such as the hooks of a sharded one, thus works for our forward as
    for the library's, which a call without `compute` still runs.

    Args:
        block: of a `NemotronHModel`; hidden: float [T, M].
        compute: what to do in it; recompute: kinds of blocks that keep `hidden` alone for their
            backward pass.
    """
    if "forward" not in vars(block):
        block.forward = types.MethodType(_forward, block)
    if block.block_type not in recompute or not torch.is_grad_enabled():
        return block(hidden, compute=compute)
    return checkpoint(block, hidden, compute=compute, use_reentrant=False)


def run_blocks(
    model: nn.Module,
    embeds: Tensor,
    rows: Tensor,
    mixing: PackedMixing,
    recompute: Container[str] = (),
    block_fn: Callable[[nn.Module, Tensor, TokenMixing], Tensor] = block_forward,
) -> Tensor:
    """Last hidden states at some tokens; nothing is computed that they do not depend on.

    From the last block on in which tokens see one another, only the wanted ones are computed.

    Args:
        model, embeds, rows, recompute, behind: see `hidden_at_rows`; mixing: of all its blocks.

    Returns:
        float [A, M].
    """
    kinds = [block.block_type for block in model.layers]
    last = max((i for i, kind in enumerate(kinds) if kind in TOKEN_MIXING_TYPES), default=-1)
    hidden = embeds if last >= 0 else embeds[rows]
    for index, block in enumerate(model.layers):
        # Finding out which sequence wants which rows would stop a GPU, which is fast at all rows.
        few = index == last and kinds[index] == "full_attention" and hidden.device.type == "cpu"
        seen = replace(mixing, rows=rows) if few else mixing
        hidden = run_block(block, hidden, partial(block_fn, mixing=seen), recompute)
        if index == last and not few:
            hidden = hidden[rows]
    return rms_norm(model.norm_f, hidden)


@dataclass(frozen=True)
class PackedMixing:
    """Tokens see the earlier ones of their sequence; a pass goes on with `rows` alone."""

    pack: Pack
    ops: MambaOps
    rows: Tensor | None = None

    def mamba(self, mixer: nn.Module, hidden: Tensor) -> Tensor:
        return mamba_mixer(mixer, hidden, self.pack, self.ops)[0]

    def attention(self, mixer: nn.Module, hidden: Tensor) -> Tensor:
        if self.rows is None:
            query, key, value = project(mixer, "qkv", hidden)
        else:
            key, value = project(mixer, "kv", hidden)
            (query,) = project(mixer, "q", hidden[self.rows])
        return merge_heads(mixer, self.attend(query, key, value, mixer.scaling))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if self.rows is None:
            return packed_attention(query, key, value, self.pack, scale)
        return attention_at(query, key, value, self.pack, self.rows, scale)


def hidden_at_rows(
    model: nn.Module,
    embeds: Tensor,
    pack: Pack,
    rows: Tensor,
    ops: MambaOps,
    recompute: Container[str] = (),
    block_fn: Callable[[nn.Module, Tensor, TokenMixing], Tensor] = block_forward,
) -> Tensor:
    """Last hidden states at some tokens, with gradients.

    Args:
        model: a `NemotronHModel`, with adapters or without.
        embeds: float [T, M]; pack: of the tokens.
        rows: int64 [A] wanted tokens; ops: of the Mamba-2 layers.
        recompute: kinds of blocks that the backward recomputes, of `ACTIVATION_CHECKPOINTING`.
        behind: `block_forward` or its compiled form.

    Returns:
        float [A, M].
    """
    return run_blocks(model, embeds, rows, PackedMixing(pack, ops), recompute, block_fn)
