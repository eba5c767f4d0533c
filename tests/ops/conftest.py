"""Packs that every op must survive."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dragkit_kernels.testing import Adjacency, adjacency, random_adjacency


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
