"""The Mamba-2 mixer of Nemotron-H: over a pack, and for one token of every sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dragkit.generator.nemotron_h.backends import MambaOps
from dragkit.generator.nemotron_h.lora import adapted_linear
from dragkit.generator.nemotron_h.pack import Pack
from dragkit_kernels import causal_conv_state, gated_rms_norm, ssd_state


class MambaState(NamedTuple):
    """State of one mixer for B sequences.

    Attributes:
        conv: float [B, C, W] last W inputs of the convolution, oldest first.
        scan: float32 [B, H, P, N] state of the scan.
    """

    conv: Tensor
    scan: Tensor


class _ScanInputs(NamedTuple):
    """Arguments of `dragkit_kernels.ssd_scan` before the positions."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor


def _project(mixer: nn.Module, hidden: Tensor) -> tuple[Tensor, ...]:
    """Gate [T, H*P], input of the convolution [T, C], and dt before its softplus [T, H]."""
    sizes = [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads]
    return adapted_linear(hidden, [mixer.in_proj], sizes)


def _scan_inputs(mixer: nn.Module, convolved: Tensor, dt: Tensor) -> _ScanInputs:
    # exp(dt A) multiplies up over a sequence, so dt and A are at least float32. The bias is widened
    # before it is added, as in mamba-ssm: a sum in bfloat16 has 2 to 3 digits.
    wide = torch.promote_types(convolved.dtype, torch.float32)
    states = mixer.n_groups * mixer.ssm_state_size
    x, b, c = convolved.split([mixer.intermediate_size, states, states], dim=-1)
    return _ScanInputs(
        x=x.unflatten(-1, (mixer.num_heads, -1)),
        dt=F.softplus(dt.to(wide) + mixer.dt_bias.to(wide)).clamp(*mixer.time_step_limit),
        A=-mixer.A_log.to(wide).exp(),
        B=b.unflatten(-1, (mixer.n_groups, -1)),
        C=c.unflatten(-1, (mixer.n_groups, -1)),
        D=mixer.D.to(wide),
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
    """The forward of a `NemotronHMamba2Mixer` for every sequence of a pack.

    Args:
        mixer: the mixer, with adapters or without.
        hidden: float [T, M].
        pack: the pack of the T tokens.
        ops: convolution and scan.
        last: int64 [B] last token of every sequence. None returns no state.

    Returns:
        [T, M] with the dtype of `hidden`, and the state after each `last` token or None.
    """
    gate, conv_input, dt = _project(mixer, hidden)
    conv = mixer.conv1d
    weight = conv.weight.squeeze(1)
    inputs = _scan_inputs(mixer, ops.conv(conv_input, weight, conv.bias, pack.position), dt)
    if pack.gate is not None:
        inputs = inputs._replace(dt=inputs.dt * pack.gate.unsqueeze(1))
    state = None
    if last is not None:
        # The state holds inputs of the convolution, not outputs.
        state = MambaState(
            causal_conv_state(conv_input, pack.position, last.int(), weight.shape[1]),
            ssd_state(*inputs[:4], pack.position, last),
        )
    return _output(mixer, ops.scan(*inputs, pack.position), gate), state


def mamba_step(mixer: nn.Module, hidden: Tensor, state: MambaState) -> Tensor:
    """The forward for the next token of every sequence. Updates `state` in place.

    Args:
        mixer: the mixer, with adapters or without.
        hidden: float [B, M].
        state: state of the B sequences.

    Returns:
        float [B, M].
    """
    gate, conv_input, dt = _project(mixer, hidden)
    conv = mixer.conv1d
    # The oldest input leaves the window. The new one, before the convolution, enters it.
    state.conv.copy_(torch.cat([state.conv[:, :, 1:], conv_input.unsqueeze(-1)], dim=-1))
    wide = torch.promote_types(conv_input.dtype, torch.float32)
    convolved = (state.conv.to(wide) * conv.weight.squeeze(1)).sum(-1)
    if conv.bias is not None:
        convolved = convolved + conv.bias
    convolved = mixer.act(convolved).to(conv_input.dtype)
    x, dt, a, b, c, d = _scan_inputs(mixer, convolved, dt)
    repeat = mixer.num_heads // mixer.n_groups
    # A group of heads shares B and C.
    b, c = (m.repeat_interleave(repeat, 1).to(dt.dtype) for m in (b, c))
    update = (dt.unsqueeze(-1) * x).unsqueeze(-1) * b.unsqueeze(2)
    # In place: the state is by far the largest tensor of a step.
    state.scan.mul_((dt * a).exp()[..., None, None]).add_(update)
    y = (state.scan @ c.unsqueeze(-1)).squeeze(-1) + d.unsqueeze(-1) * x
    return _output(mixer, y.to(hidden.dtype), gate)
