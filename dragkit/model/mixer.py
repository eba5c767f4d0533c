"""The Mamba-2 mixer of Nemotron-H for training: whole sequences, no cache, no mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dragkit.model.lora import adapted_linear

# Tokens of a chunk on a CPU; the size changes no result but rounding.
_CHUNK = 32


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise convolution over the past W tokens, zeros before the first.

    Args:
        x: float [B, L, C]; weight: float [C, W], the last tap for the token itself.
        bias: float [C] or None.

    Returns:
        float [B, L, C].
    """
    length, taps = x.shape[1], weight.shape[1]
    y = x * weight[:, -1] if bias is None else torch.addcmul(bias, x, weight[:, -1])
    padded = F.pad(x, (0, 0, taps - 1, 0))
    for tap in range(taps - 1):
        y = torch.addcmul(y, padded[:, tap : tap + length], weight[:, tap])
    return y


def chunk_scan(
    x: Tensor, dt: Tensor, rate: Tensor, into: Tensor, out_of: Tensor, chunk: int = _CHUNK
) -> Tensor:
    """Mamba-2: s_t = exp(rate dt_t) s_{t-1} + dt_t x_t into_t^T from zero, y_t = s_t out_of_t.

    Inside a chunk the recurrence is one masked product per head, and between chunks one over the
    chunks' states (Dao and Gu 2024, section 6). Maps stay at the width of their groups.

    Args:
        x: float [B, L, H, P] inputs; dt: float [B, L, H] step sizes, not negative.
        rate: float [H], negative; into, out_of: float [B, L, G, N] with H a multiple of G.
        chunk: tokens per chunk.

    Returns:
        float [B, L, H, P].
    """
    batch, length, heads, width = x.shape
    groups = into.shape[2]
    pad = -length % chunk
    count = (length + pad) // chunk

    def chunked(tensor: Tensor, *inner: int) -> Tensor:
        """[B, L, ...] as [B, c, q, ...] with zeros behind."""
        if pad:
            tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, pad))
        return tensor.reshape(batch, count, chunk, *inner)

    # [B, c, G, H/G, q, P], [B, c, G, 1, q, N] and [B, c, G, H/G, q]
    value = chunked(x * dt[..., None], groups, heads // groups, width).permute(0, 1, 3, 4, 2, 5)
    into = chunked(into, groups, 1, into.shape[3]).permute(0, 1, 3, 4, 2, 5)
    out_of = chunked(out_of, groups, 1, out_of.shape[3]).permute(0, 1, 3, 4, 2, 5)
    decay = chunked(rate * dt, groups, heads // groups).permute(0, 1, 3, 4, 2).cumsum(-1)

    future = torch.full((chunk, chunk), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
    kept = (decay[..., :, None] - (decay[..., None, :] - future)).exp()
    y = ((out_of @ into.mT) * kept) @ value
    if count > 1:
        end = decay[..., -1:]
        gained = (value * (end - decay).exp()[..., None]).mT @ into  # [B, c, G, H/G, P, N]
        start = _carry(gained, end.squeeze(-1))
        y = y + (out_of @ start.mT) * decay.exp()[..., None]
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, count * chunk, heads, width)
    return y[:, :length]


def _carry(gained: Tensor, decay: Tensor) -> Tensor:
    """States at the chunks' starts from what each chunk adds, [B, c, G, R, P, N] both.

    `decay` [B, c, G, R] is the logarithm of what a whole chunk leaves of the state before it.
    """
    count = gained.shape[1]
    total = decay.permute(0, 2, 3, 1).cumsum(-1)  # [B, G, R, c]
    before = torch.cat([torch.zeros_like(total[..., :1]), total[..., :-1]], -1)
    later = torch.full((count, count), float("-inf"), dtype=total.dtype, device=total.device)
    share = (before[..., :, None] - (total[..., None, :] - later.triu(0))).exp()
    flat = gained.permute(0, 2, 3, 1, 4, 5).flatten(4)  # [B, G, R, c, P * N]
    states = (share @ flat).unflatten(4, gained.shape[4:])
    return states.permute(0, 3, 1, 2, 4, 5)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """RMS norm of x silu(gate) within each of the groups.

    Args:
        x, gate: float [..., D]; weight: float [D]; groups: a divisor of D; eps: of the norm.

    Returns:
        float [..., D].
    """
    gated = (x * F.silu(gate)).unflatten(-1, (groups, -1))
    scale = torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return (gated * scale).flatten(-2) * weight


def mamba_mixer(mixer: nn.Module, hidden: Tensor) -> Tensor:
    """What the library's mixer computes without cache and mask.

    Args:
        mixer: a `NemotronHMamba2Mixer`, with adapters or without; hidden: float [B, L, M].

    Returns:
        float [B, L, M], of the type of `hidden`.
    """
    states = mixer.n_groups * mixer.ssm_state_size
    inner, heads = mixer.intermediate_size, mixer.num_heads
    kind = torch.promote_types(hidden.dtype, torch.float32)
    projected = adapted_linear(hidden, [mixer.in_proj])
    gate, mixed, dt = projected.split([inner, mixer.conv_dim, heads], dim=-1)
    bias = mixer.conv1d.bias
    mixed = mixer.act(causal_conv(mixed, mixer.conv1d.weight.squeeze(1), bias)).to(kind)
    x, into, out_of = mixed.split([inner, states, states], dim=-1)
    x = x.unflatten(-1, (heads, -1))
    dt = F.softplus((dt + mixer.dt_bias).to(kind)).clamp(*mixer.time_step_limit)
    y = chunk_scan(
        x,
        dt,
        -mixer.A_log.to(kind).exp(),
        into.unflatten(-1, (mixer.n_groups, -1)),
        out_of.unflatten(-1, (mixer.n_groups, -1)),
    )
    y = (y + x * mixer.D[:, None]).flatten(-2).to(hidden.dtype).to(kind)
    norm = mixer.norm
    y = gated_norm(y, gate.to(kind), norm.weight, mixer.n_groups, norm.variance_epsilon)
    return adapted_linear(y.to(hidden.dtype), [mixer.out_proj])
