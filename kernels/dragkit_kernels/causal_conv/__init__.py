"""Causal depthwise convolution over packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_float, check_index, check_shape, widest
from . import op as _op  # noqa: F401  (registers the ops)
from .reference import causal_conv_ref

__all__ = ["causal_conv", "causal_conv_ref", "causal_conv_state"]


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_pos: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """y_t = silu(b + sum_{j < W, j <= position_t} weight[:, W-1-j] x_{t-j}).

    Taps that cross a sequence boundary are masked with `where` instead of multiplied by 0, so a NaN
    cannot leak. Sums are in float32, or float64 if x or weight is. The op saves only its inputs and
    recomputes the sums in the backward. The PyTorch path reads `seq_pos` on the host, which waits
    for a GPU.

    Args:
        x: float [T, C] tokens of all sequences end to end. It may be row-strided, such as a column
            slice of a wider matrix.
        weight: float [C, W]. The last tap multiplies the token itself.
        bias: float [C] or None.
        seq_pos: int32 [T] position of a token in its own sequence, from 0, at most t. Padding rows
            have 0. Values are not checked.
        backend: "auto", "triton" or "torch".

    Returns:
        [T, C] of x's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: the backend is "triton" and Triton cannot run here.

    Source: the convolution of Mamba-2, https://arxiv.org/abs/2405.21060.
    """
    check_shape("causal_conv", "x", x, (None, None))
    check_shape("causal_conv", "weight", weight, (x.shape[1], None))
    check_shape("causal_conv", "seq_pos", seq_pos, (x.shape[0],))
    check_float("causal_conv", x=x, weight=weight)
    check_index("causal_conv", seq_pos=seq_pos)
    if weight.shape[1] < 1:
        raise ValueError(f"causal_conv: weight must have a tap, got shape {list(weight.shape)}")
    if bias is not None:
        check_shape("causal_conv", "bias", bias, (x.shape[1],))
        check_float("causal_conv", bias=bias)
    triton = resolve_backend("causal_conv", widest(x, weight), backend) == "triton"
    return torch.ops.dragkit.causal_conv_fwd(x, weight, bias, seq_pos, triton)


def causal_conv_state(x: Tensor, seq_pos: Tensor, last_row: Tensor, width: int) -> Tensor:
    """The last `width` inputs of each sequence, from which decoding continues the convolution.

    The layout is that of `conv_states` in the transformers cache of NemotronHMamba2Mixer: channels,
    then time from oldest to newest. [..., -1] is the last token. Inputs before the start of a
    sequence are 0.

    Args:
        x: float [T, C] input of `causal_conv`.
        seq_pos: int32 [T] see causal_conv.
        last_row: int32 [S] row of the last token of each sequence.
        width: taps W of the convolution.

    Returns:
        [S, C, width] of x's dtype, contiguous.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    check_shape("causal_conv_state", "x", x, (None, None))
    check_shape("causal_conv_state", "seq_pos", seq_pos, (x.shape[0],))
    check_shape("causal_conv_state", "last_row", last_row, (None,))
    check_float("causal_conv_state", x=x)
    check_index("causal_conv_state", seq_pos=seq_pos, last_row=last_row)
    if width < 1:
        raise ValueError(f"causal_conv_state: width must be at least 1, got {width}")
    lag = torch.arange(width - 1, -1, -1, device=x.device)
    rows = (last_row.unsqueeze(1) - lag).clamp(min=0)
    in_sequence = seq_pos[last_row.long()].unsqueeze(1) >= lag
    inputs = torch.where(in_sequence.unsqueeze(2), x[rows], 0.0)
    return inputs.mT.contiguous()
