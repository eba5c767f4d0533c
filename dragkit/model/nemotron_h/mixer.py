"""The Mamba-2 mixer of Nemotron-H over packs, for training, and one token at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dragkit.model.nemotron_h.backends import MambaOps
from dragkit.model.nemotron_h.lora import adapted_linear
from dragkit.model.nemotron_h.pack import Pack
from dragkit_kernels import causal_conv_state, gated_rms_norm, ssd_state


class MambaState(NamedTuple):
    """What a mixer remembers of B sequences.

    Attributes:
        conv: float [B, C, W] the last W inputs of the convolution, oldest first.
        scan: float32 [B, H, P, N] the state.
    """

    conv: Tensor
    scan: Tensor


class _Inputs(NamedTuple):
    """Inputs of the scan, as `dragkit_kernels.ssd_scan` names them."""

    x: Tensor
    dt: Tensor
    rate: Tensor
    into: Tensor
    out_of: Tensor
    skip: Tensor


def _project(mixer: nn.Module, hidden: Tensor) -> tuple[Tensor, ...]:
    """Gate [T, H*P], what the convolution reads [T, C], and raw step sizes [T, H]."""
    sizes = [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads]
    return adapted_linear(hidden, [mixer.in_proj], sizes)


def _inputs(mixer: nn.Module, mixed: Tensor, dt: Tensor) -> _Inputs:
    kind = torch.promote_types(mixed.dtype, torch.float32)
    states = mixer.n_groups * mixer.ssm_state_size
    x, into, out_of = mixed.split([mixer.intermediate_size, states, states], dim=-1)
    return _Inputs(
        x.unflatten(-1, (mixer.num_heads, -1)),
        F.softplus((dt + mixer.dt_bias).to(kind)).clamp(*mixer.time_step_limit),
        -mixer.A_log.to(kind).exp(),
        into.unflatten(-1, (mixer.n_groups, -1)),
        out_of.unflatten(-1, (mixer.n_groups, -1)),
        mixer.D.to(kind),
    )


def _output(mixer: nn.Module, y: Tensor, gate: Tensor) -> Tensor:
    norm = mixer.norm
    y = gated_rms_norm(
        y.flatten(-2), gate, norm.weight, groups=mixer.n_groups, eps=norm.variance_epsilon
    )
    return adapted_linear(y.to(gate.dtype), [mixer.out_proj])[0]


def mamba_mixer(
    mixer: nn.Module, hidden: Tensor, pack: Pack, ops: MambaOps, last: Tensor | None = None
) -> tuple[Tensor, MambaState | None]:
    """What the library's mixer computes for every sequence on its own.

    Args:
        mixer: a `NemotronHMamba2Mixer`, with adapters or without; hidden: float [T, M].
        pack: of the T tokens; ops: convolution and scan.
        last: int64 [B] last token of every sequence, to return the states behind them.

    Returns:
        float [T, M], of the type of `hidden`; the states where asked for.
    """
    gate, mixed, dt = _project(mixer, hidden)
    conv = mixer.conv1d
    weight = conv.weight.squeeze(1)
    convolved = ops.conv(mixed, weight, conv.bias, pack.position)
    inputs = _inputs(mixer, convolved, dt)
    state = None
    if last is not None:
        x, steps, rate, into, *_ = inputs
        state = MambaState(
            causal_conv_state(mixed, pack.position, last.int(), weight.shape[1]),
            ssd_state(x, steps, rate, into, pack.position, last),
        )
    y = ops.scan(*inputs, pack.position)
    return _output(mixer, y, gate), state


def mamba_step(mixer: nn.Module, hidden: Tensor, state: MambaState) -> Tensor:
    """One more token of every sequence; the state is moved on in place.

    Args:
        mixer: as above; hidden: float [B, M]; state: of the B sequences.

    Returns:
        float [B, M].
    """
    gate, mixed, dt = _project(mixer, hidden)
    conv = mixer.conv1d
    state.conv.copy_(torch.cat([state.conv[:, :, 1:], mixed.unsqueeze(-1)], dim=-1))
    kind = torch.promote_types(mixed.dtype, torch.float32)
    summed = (state.conv.to(kind) * conv.weight.squeeze(1)).sum(-1)
    if conv.bias is not None:
        summed = summed + conv.bias
    mixed = mixer.act(summed).to(mixed.dtype)
    x, dt, rate, into, out_of, skip = _inputs(mixer, mixed, dt)
    repeat = mixer.num_heads // mixer.n_groups
    into, out_of = (m.repeat_interleave(repeat, 1).to(dt.dtype) for m in (into, out_of))
    gained = (dt.unsqueeze(-1) * x).unsqueeze(-1) * into.unsqueeze(2)
    state.scan.mul_((dt * rate).exp()[..., None, None]).add_(gained)
    y = (state.scan @ out_of.unsqueeze(-1)).squeeze(-1) + skip.unsqueeze(-1) * x
    return _output(mixer, y.to(hidden.dtype), gate)
