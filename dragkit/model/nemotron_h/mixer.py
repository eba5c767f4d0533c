"""The Mamba-2 mixer of Nemotron-H for training: whole sequences, no cache, no mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dragkit.model.nemotron_h.lora import adapted_linear
from dragkit.model.nemotron_h.norm import rms_norm
from dragkit.model.nemotron_h.scan import chunk_scan


class _CausalConv(torch.autograd.Function):
    """Depthwise convolution as shifted sums; a gradient for the input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # A tap for every token: products of whole arrays run at several times the speed of
        # products with a short row.
        taps = weight.mT[:, None].expand(-1, x.shape[1], -1).contiguous()
        ctx.save_for_backward(taps)
        y = x * taps[-1]
        for back in range(1, min(len(taps), x.shape[1])):
            y[:, back:].addcmul_(x[:, :-back], taps[-1 - back, back:])
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (taps,) = ctx.saved_tensors
        grad_x = grad * taps[-1]
        for back in range(1, min(len(taps), grad.shape[1])):
            grad_x[:, :-back].addcmul_(grad[:, back:], taps[-1 - back, back:])
        return grad_x, None, None


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise convolution over the past W tokens, zeros before the first.

    Args:
        x: float [B, L, C]; weight: float [C, W], the last tap for the token itself.
        bias: float [C] or None.

    Returns:
        float [B, L, C].
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        taps, channels = weight.shape[1], weight.shape[0]
        padded = F.pad(x.mT, (taps - 1, 0))
        return F.conv1d(padded, weight[:, None], bias, groups=channels).mT
    return _CausalConv.apply(x, weight, bias)


def mamba_mixer(mixer: nn.Module, hidden: Tensor) -> Tensor:
    """What the library's mixer computes without cache and mask.

    Args:
        mixer: a `NemotronHMamba2Mixer`, with adapters or without; hidden: float [B, L, M].

    Returns:
        float [B, L, M], of the type of `hidden`.
    """
    groups, heads, inner = mixer.n_groups, mixer.num_heads, mixer.intermediate_size
    states = groups * mixer.ssm_state_size
    kind = torch.promote_types(hidden.dtype, torch.float32)
    gate, mixed, dt = adapted_linear(hidden, [mixer.in_proj], [inner, mixer.conv_dim, heads])
    conv = mixer.conv1d
    mixed = mixer.act(causal_conv(mixed, conv.weight.squeeze(1), conv.bias)).to(kind)
    x, into, out_of = mixed.split([inner, states, states], dim=-1)
    x = x.unflatten(-1, (heads, -1))
    dt = F.softplus((dt + mixer.dt_bias).to(kind)).clamp(*mixer.time_step_limit)
    maps = [tensor.unflatten(-1, (groups, -1)) for tensor in (into, out_of)]
    y = chunk_scan(x, dt, -mixer.A_log.to(kind).exp(), *maps, mixer.D.to(kind)).flatten(-2)
    norm = mixer.norm
    y = rms_norm(y * F.silu(gate.to(kind)), norm.weight, norm.variance_epsilon, groups)
    return adapted_linear(y.to(hidden.dtype), [mixer.out_proj])[0]
