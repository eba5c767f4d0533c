"""The matrix products of the layer that PyTorch computes."""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, also under torch.autocast, which reaches into an op's implementation."""
    a, b = a.to(dtype), b.to(dtype)
    if not torch.is_autocast_enabled(a.device.type):
        # Entering a context costs as much as a small product.
        return a @ b
    with torch.autocast(a.device.type, enabled=False):
        return a @ b
