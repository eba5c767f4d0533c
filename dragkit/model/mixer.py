"""The Mamba-2 mixer of Nemotron-H for training: whole sequences, no cache, no mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dragkit.model.lora import adapted_linear
from dragkit.model.norm import rms_norm

# Tokens of a chunk on a CPU; the size changes no result but rounding.
_CHUNK = 32


class _CausalConv(torch.autograd.Function):
    """Depthwise convolution as shifted sums; a gradient for the input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        y = x * weight[:, -1] if bias is None else torch.addcmul(bias, x, weight[:, -1])
        for back in range(1, min(weight.shape[1], x.shape[1])):
            y[:, back:].addcmul_(x[:, :-back], weight[:, -1 - back])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        grad_x = grad * weight[:, -1]
        for back in range(1, min(weight.shape[1], grad.shape[1])):
            grad_x[:, :-back].addcmul_(grad[:, back:], weight[:, -1 - back])
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


def chunk_scan(
    x: Tensor, dt: Tensor, rate: Tensor, into: Tensor, out_of: Tensor, chunk: int = _CHUNK
) -> Tensor:
    """Mamba-2: s_t = exp(rate dt_t) s_{t-1} + dt_t x_t into_t^T from zero, y_t = s_t out_of_t.

    Inside a chunk the recurrence is one masked product per head, and between chunks one over the
    chunks' states (Dao and Gu 2024, section 6). Maps stay at the width of their groups, and the
    heads of a group share the products with them.

    Args:
        x: float [B, L, H, P] inputs; dt: float [B, L, H] step sizes, not negative.
        rate: float [H], negative; into, out_of: float [B, L, G, N] with H a multiple of G.
        chunk: tokens per chunk.

    Returns:
        float [B, L, H, P].
    """
    batch, length, heads, width = x.shape
    groups, states = into.shape[2:]
    share = heads // groups
    pad = -length % chunk
    count = (length + pad) // chunk

    def chunked(tensor: Tensor) -> Tensor:
        """[B, L, ...] as [B, c, q, ...] with zeros behind."""
        if pad:
            tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, pad))
        return tensor.unflatten(1, (count, chunk))

    value = chunked(x * dt[..., None])  # [B, c, q, H, P]
    into, out_of = chunked(into).transpose(2, 3), chunked(out_of).transpose(2, 3)  # [B, c, G, q, N]
    decay = chunked(rate * dt).cumsum(2)  # [B, c, q, H]

    by_head = decay.transpose(2, 3)
    future = torch.full((chunk, chunk), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
    kept = (by_head[..., :, None] - by_head[..., None, :]).add_(future).exp_()
    kept = kept.unflatten(2, (groups, share))
    seen = ((out_of @ into.mT).unsqueeze(3) * kept).flatten(2, 3)  # [B, c, H, q, q]
    y = (seen @ value.transpose(2, 3)).transpose(2, 3)
    if count > 1:
        to_end = (decay[:, :, -1:] - decay).exp()
        rows = (value * to_end[..., None]).unflatten(3, (groups, share)).flatten(4)
        gained = into.mT @ rows.transpose(2, 3)  # [B, c, G, N, H/G * P]
        start = _carry(gained.unflatten(4, (share, width)), decay[:, :, -1])
        carried = (out_of @ start.flatten(4)).transpose(2, 3)  # [B, c, q, G, H/G * P]
        carried = carried.reshape(batch, count, chunk, heads, width)
        y = torch.addcmul(y, carried, decay.exp()[..., None])
    return y.reshape(batch, count * chunk, heads, width)[:, :length]


def _carry(gained: Tensor, decay: Tensor) -> Tensor:
    """States at the chunks' starts from what each chunk adds, [B, c, G, N, R, P] both.

    `decay` [B, c, G * R] is the logarithm of what a whole chunk leaves of the state before it.
    """
    count, groups = gained.shape[1:3]
    total = decay.mT.cumsum(-1)  # [B, H, c]
    before = F.pad(total[..., :-1], (1, 0))
    late = torch.full((count, count), float("-inf"), dtype=total.dtype, device=total.device).triu()
    share = (before[..., :, None] - total[..., None, :]).add_(late).exp_()
    added = gained.permute(0, 2, 4, 1, 3, 5)  # [B, G, R, c, N, P]
    states = share.unflatten(1, (groups, -1)) @ added.flatten(4)
    return states.unflatten(4, added.shape[4:]).permute(0, 3, 1, 4, 2, 5)


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
    projected = adapted_linear(hidden, [mixer.in_proj])
    gate, mixed, dt = projected.split([inner, mixer.conv_dim, heads], dim=-1)
    conv = mixer.conv1d
    mixed = mixer.act(causal_conv(mixed, conv.weight.squeeze(1), conv.bias)).to(kind)
    x, into, out_of = mixed.split([inner, states, states], dim=-1)
    x = x.unflatten(-1, (heads, -1))
    dt = F.softplus((dt + mixer.dt_bias).to(kind)).clamp(*mixer.time_step_limit)
    maps = [tensor.unflatten(-1, (groups, -1)) for tensor in (into, out_of)]
    y = chunk_scan(x, dt, -mixer.A_log.to(kind).exp(), *maps)
    y = torch.addcmul(y, x, mixer.D.to(kind)[:, None]).flatten(-2)
    norm = mixer.norm
    y = rms_norm(y * F.silu(gate.to(kind)), norm.weight, norm.variance_epsilon, groups)
    return adapted_linear(y.to(hidden.dtype), [mixer.out_proj])
