"""torch.compile, applied from outside the models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def compile_retriever(retriever: nn.Module) -> Callable:
    """The whole retriever as one graph with dynamic sizes."""
    return torch.compile(retriever, fullgraph=True, dynamic=True)
