"""Packs with edge cases, and the two backends of an op.

A test with the fixture `backend` runs once for PyTorch and once for Triton. The Triton item has the
marks `triton` and `gpu`, like a test with `pytest.mark.triton`. With TRITON_INTERPRET=1 these items
run interpreted, and all others are deselected. Otherwise they need a CUDA device.
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
    """Marks the items of kernels. With the interpreter, deselects all others in this folder."""
    selected, deselected = [], []
    for item in items:
        is_kernel_item = item.get_closest_marker("triton") is not None
        if is_kernel_item:
            item.add_marker(pytest.mark.gpu)
            if not KERNELS_RUN:
                item.add_marker(NO_KERNELS)
        in_this_folder = item.path.is_relative_to(Path(__file__).parent)
        deselect = INTERPRETED and in_this_folder and not is_kernel_item
        (deselected if deselect else selected).append(item)
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = selected


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.triton)])
def backend(request: pytest.FixtureRequest) -> str:
    """The value of an op's argument `backend`."""
    return request.param


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of the item: CUDA for compiled kernels, else the CPU."""
    compiled = request.node.get_closest_marker("triton") is not None and not INTERPRETED
    return torch.device("cuda" if compiled else "cpu")


def _star() -> Adjacency:
    """Node 0 is the tail of all 70 facts, which share one relation. Node 71 is isolated."""
    head = torch.arange(1, 71)
    return adjacency([(72, 70)], head, torch.zeros_like(head), torch.zeros_like(head))


def _duplicates() -> Adjacency:
    """One fact nine times, a self-loop twice, and the reverse fact once."""
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
