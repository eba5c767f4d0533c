"""Tolerances and inputs shared by the tests of several ops."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dragkit_kernels.backend import INTERPRETED
from dragkit_kernels.testing import Adjacency

# Sums run in float32 and are rounded once to the result's dtype. The interpreter truncates to
# bfloat16, a GPU rounds.
FORWARD = {
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3 if INTERPRETED else 4e-3,
}
GRADIENT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
DTYPES = pytest.mark.parametrize("dtype", list(FORWARD), ids=str)
# Arguments of message_passing.
LAYER_NAMES = ("h", "p", "table_fwd", "table_inv", "self_table", "weight", "bias")


def kernels(name: str) -> ModuleType:
    """Imports a module of kernels, such as "causal_conv.forward", in a test with the mark `triton`.

    Test modules must not import it: they are also collected without Triton.
    """
    return importlib.import_module(f"dragkit_kernels.{name}")


def layer_inputs(pack: Adjacency, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random arguments of message_passing for a pack, in the order of `LAYER_NAMES`."""
    nodes, pairs = pack.fact_index.num_nodes, pack.fact_index.num_pairs
    graphs = len(pack.node_ptr) - 1
    shapes = [
        *((nodes, width), (nodes,), (pairs, width), (pairs, width)),
        *((graphs, width), (width, width), (width,)),
    ]
    generator = torch.Generator().manual_seed(width)
    device = pack.node_graph.device
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
