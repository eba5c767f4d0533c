"""The matrix products of the layer that a library makes."""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, also under torch.autocast, which reaches into an op's implementation."""
    with torch.autocast(a.device.type, enabled=False):
        return a.to(dtype) @ b.to(dtype)
