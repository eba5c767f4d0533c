"""Causal convolution of packed sequences by its formula: plain PyTorch with autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulator_dtype


def causal_conv_ref(x: Tensor, weight: Tensor, bias: Tensor | None, seq_pos: Tensor) -> Tensor:
    """silu(b + sum_j weight[:, W-1-j] x_{t-j}) over j < W and j <= seq_pos_t, see causal_conv."""
    dtype = accumulator_dtype(x, weight)
    rows, width = x.shape[0], weight.shape[1]
    x_acc, taps = x.to(dtype), weight.to(dtype)
    y = torch.zeros_like(x_acc)
    for lag in range(width):
        # Mask before and after the product: in the backward, 0 times NaN is NaN.
        in_sequence = (seq_pos >= lag).unsqueeze(1)
        shifted = torch.where(in_sequence, F.pad(x_acc, (0, 0, lag, 0))[:rows], 0.0)
        y = y + torch.where(in_sequence, shifted * taps[:, width - 1 - lag], 0.0)
    if bias is not None:
        y = y + bias.to(dtype)
    return F.silu(y).to(x.dtype)
