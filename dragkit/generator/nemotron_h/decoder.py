"""The blocks of a Nemotron-H over packs of tokens."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

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
from dragkit.generator.nemotron_h.patches import PackedForward, accept_packed_forward
from dragkit_kernels import gated_rms_norm

# Types of blocks in which a token reads other tokens.
TOKEN_MIXING_TYPES = ("linear_attention", "full_attention")
# Up to this many rows, the call of our norm costs more than its faster passes save.
_SMALL_NORM_ROWS = 256
# `generator.activation_checkpointing` -> types of blocks that keep only their input and are
# recomputed in the backward.
ACTIVATION_CHECKPOINTING: dict[str, tuple[str, ...]] = {
    "none": (),
    "mamba": ("linear_attention",),
    "all": ("linear_attention", "full_attention", "moe", "mlp"),
}


class TokenMixing(Protocol):
    """Computes the two types of mixers in which a token reads other tokens.

    Attributes:
        rows: int64 [A] tokens that the block returns. None returns all.
    """

    rows: Tensor | None

    def mamba(self, mixer: nn.Module, hidden: Tensor) -> Tensor: ...

    def attention(self, mixer: nn.Module, hidden: Tensor) -> Tensor: ...


BlockFunction = Callable[[nn.Module, Tensor, TokenMixing], Tensor]


def is_supported(config: object) -> bool:
    """Whether this package computes what a model of the configuration computes."""
    if getattr(config, "model_type", None) != "nemotron_h":
        return False
    return not getattr(config, "attention_dropout", 0.0) and config.mamba_hidden_act == "silu"


def rms_norm(norm: nn.Module, hidden: Tensor) -> Tensor:
    """Applies a `NemotronHRMSNorm` to hidden states, float [T, M]."""
    if not torch.is_grad_enabled() and hidden.shape[0] <= _SMALL_NORM_ROWS:
        return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
    return gated_rms_norm(hidden, None, norm.weight, groups=1, eps=norm.variance_epsilon)


def project(mixer: nn.Module, names: str, hidden: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value, or those of them in `names` ("qkv"), each [..., its heads, D]."""
    projected = adapted_linear(hidden, [getattr(mixer, f"{name}_proj") for name in names])
    return tuple(x.unflatten(-1, (-1, mixer.head_dim)) for x in projected)


def merge_heads(mixer: nn.Module, heads: Tensor) -> Tensor:
    """Output projection of attention: float [T, M] from the heads, float [T, H, D]."""
    return adapted_linear(heads.flatten(-2), [mixer.o_proj])[0]


def _feed_forward(mixer: nn.Module, hidden: Tensor) -> Tensor:
    (up,) = adapted_linear(hidden, [mixer.up_proj])
    return adapted_linear(mixer.act_fn(up), [mixer.down_proj])[0]


def _mix(
    norm: nn.Module, mixer: nn.Module, block_type: str, hidden: Tensor, mixing: TokenMixing
) -> Tensor:
    normed = rms_norm(norm, hidden)
    if block_type == "linear_attention":
        return mixing.mamba(mixer, normed)
    if block_type == "full_attention":
        return mixing.attention(mixer, normed)
    if block_type == "mlp":
        return _feed_forward(mixer, normed)
    return routed_forward(mixer, normed) + _feed_forward(mixer.shared_experts, normed)


def residual_block(
    norm: nn.Module, mixer: nn.Module, block_type: str, hidden: Tensor, mixing: TokenMixing
) -> Tensor:
    """`block_forward` of a block that is given by its norm, its mixer and its type."""
    residual = hidden if mixing.rows is None else hidden[mixing.rows]
    return residual + _mix(norm, mixer, block_type, hidden, mixing)


def block_forward(block: nn.Module, hidden: Tensor, mixing: TokenMixing) -> Tensor:
    """Hidden states after a block: float [T, M], or [A, M] where `mixing.rows` is set."""
    return residual_block(block.norm, block.mixer, block.block_type, hidden, mixing)


def run_block(
    block: nn.Module,
    hidden: Tensor,
    packed_forward: PackedForward,
    checkpointed: Container[str] = (),
) -> Tensor:
    """Calls a block as a module, so that its hooks run around our forward.

    Args:
        block: a block of a `NemotronHModel`.
        hidden: float [T, M].
        packed_forward: the forward that the call runs.
        checkpointed: types of blocks that are recomputed in the backward.
    """
    accept_packed_forward(block)
    if block.block_type not in checkpointed or not torch.is_grad_enabled():
        return block(hidden, packed_forward=packed_forward)
    # The reentrant form gives adapters no gradient where `hidden` has none.
    return checkpoint(block, hidden, packed_forward=packed_forward, use_reentrant=False)


def run_blocks(
    model: nn.Module,
    embeds: Tensor,
    rows: Tensor,
    mixing: PackedMixing,
    checkpointed: Container[str] = (),
    block_fn: BlockFunction = block_forward,
) -> Tensor:
    """`hidden_at_rows` with a given token mixing.

    After the last block in which tokens read one another, only the wanted rows are computed.
    """
    block_types = [block.block_type for block in model.layers]
    last = max((i for i, t in enumerate(block_types) if t in TOKEN_MIXING_TYPES), default=-1)
    hidden = embeds if last >= 0 else embeds[rows]
    for index, block in enumerate(model.layers):
        # On a GPU, finding the sequences of the rows would make the host wait.
        at_rows = (
            index == last and block_types[index] == "full_attention" and hidden.device.type == "cpu"
        )
        block_mixing = replace(mixing, rows=rows) if at_rows else mixing
        hidden = run_block(block, hidden, partial(block_fn, mixing=block_mixing), checkpointed)
        # From here on, tokens do not read one another.
        if index == last and not at_rows:
            hidden = hidden[rows]
    return rms_norm(model.norm_f, hidden)


@dataclass(frozen=True)
class PackedMixing:
    """A token reads itself and the earlier tokens of its sequence. See `TokenMixing`."""

    pack: Pack
    ops: MambaOps
    rows: Tensor | None = None

    def mamba(self, mixer: nn.Module, hidden: Tensor) -> Tensor:
        return mamba_mixer(mixer, hidden, self.pack, self.ops)[0]

    def attention(self, mixer: nn.Module, hidden: Tensor) -> Tensor:
        if self.rows is None:
            query, key, value = project(mixer, "qkv", hidden)
        else:
            # The wanted tokens read keys and values of all tokens.
            key, value = project(mixer, "kv", hidden)
            (query,) = project(mixer, "q", hidden[self.rows])
        return merge_heads(mixer, self.attend(query, key, value, mixer.scaling))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        gate = self.pack.gate
        if gate is not None:
            # More channels add the log of its gate to the scores of a key. Attention kernels want
            # head widths that are multiples of 8.
            log_gate = gate.log()[:, None, None].to(key.dtype).expand(-1, key.shape[1], 1)
            key = F.pad(torch.cat([key, log_gate], -1), (0, 7))
            query = F.pad(F.pad(query, (0, 1), value=1 / scale), (0, 7))
            value = F.pad(value, (0, 8))
        if self.rows is None:
            heads = packed_attention(query, key, value, self.pack, scale)
        else:
            heads = attention_at(query, key, value, self.pack, self.rows, scale)
        return heads if gate is None else heads[..., :-8]


def hidden_at_rows(
    model: nn.Module,
    embeds: Tensor,
    pack: Pack,
    rows: Tensor,
    ops: MambaOps,
    checkpointed: Container[str] = (),
    block_fn: BlockFunction = block_forward,
) -> Tensor:
    """Last hidden states at some tokens, differentiable.

    Args:
        model: a `NemotronHModel`, with adapters or without.
        embeds: float [T, M].
        pack: the pack of these tokens.
        rows: int64 [A] wanted tokens.
        ops: convolution and scan of the Mamba-2 blocks.
        checkpointed: types of blocks that are recomputed in the backward, a value of
            `ACTIVATION_CHECKPOINTING`.
        block_fn: `block_forward`, or its compiled form (`CompiledBlocks`).

    Returns:
        float [A, M].
    """
    return run_blocks(model, embeds, rows, PackedMixing(pack, ops), checkpointed, block_fn)
