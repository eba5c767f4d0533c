"""Packs that every op must survive, and the two backends of an op.

A test that asks for `backend` runs once for PyTorch and once for Triton. The Triton item has the
markers `triton` and `gpu`, as a test of kernels alone has that carries `pytest.mark.triton`. Such
items run interpreted under TRITON_INTERPRET=1, where they are the only ones, else on a CUDA device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dragkit_kernels.backend import HAS_TRITON, INTERPRETED
from dragkit_kernels.testing import Adjacency, adjacency, random_adjacency

KERNELS_RUN = HAS_TRITON and (INTERPRETED or torch.cuda.is_available())
NO_KERNELS = pytest.mark.skip(reason="needs a CUDA device, or TRITON_INTERPRET=1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the items of kernels, and leaves out the others where kernels are interpreted."""
    kept, others = [], []
    for item in items:
        of_kernels = item.get_closest_marker("triton") is not None
        if of_kernels:
            item.add_marker(pytest.mark.gpu)
            if not KERNELS_RUN:
                item.add_marker(NO_KERNELS)
        here = item.path.is_relative_to(Path(__file__).parent)
        (others if INTERPRETED and here and not of_kernels else kept).append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = kept


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.triton)])
def backend(request: pytest.FixtureRequest) -> str:
    """The argument `backend` of an op."""
    return request.param


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the item's backend runs: compiled kernels on a CUDA device, all else on the CPU."""
    compiled = request.node.get_closest_marker("triton") is not None and not INTERPRETED
    return torch.device("cuda" if compiled else "cpu")


def _star() -> Adjacency:
    """Node 0 is the tail of 70 facts of one relation and the head of none; node 71 is isolated."""
    head = torch.arange(1, 71)
    return adjacency([(72, 70)], head, torch.zeros_like(head), torch.zeros_like(head))


def _duplicates() -> Adjacency:
    """The same fact nine times, a self-loop twice, and the reverse fact once."""
    head = torch.tensor([0] * 9 + [2, 2] + [1])
    tail = torch.tensor([1] * 9 + [2, 2] + [0])
    return adjacency([(3, 12)], head, tail, torch.tensor([4] * 9 + [0, 0] + [4]))


PACKS: dict[str, Callable[[], Adjacency]] = {
    "empty_first_middle_last": lambda: random_adjacency(
        [(0, 0), (5, 12), (1, 3), (0, 0), (13, 31), (4, 0), (0, 0)], 6
    ),
    "one_graph": lambda: random_adjacency([(6, 15)], 3),
    "many_graphs": lambda: random_adjacency([(3, 4)] * 20, 5),
    "no_facts": lambda: random_adjacency([(3, 0), (2, 0)], 1),
    "star": _star,
    "duplicates": _duplicates,
}


@pytest.fixture(params=PACKS, ids=list(PACKS))
def pack(request: pytest.FixtureRequest) -> Adjacency:
    return PACKS[request.param]()
