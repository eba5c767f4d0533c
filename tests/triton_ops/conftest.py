"""Kernels against their references: interpreted under TRITON_INTERPRET=1, else on a CUDA device.

All of these tests are of the `gpu` tier: `pytest -m gpu` on a device runs them compiled.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dragkit_kernels.backend import HAS_TRITON, INTERPRETED

if not HAS_TRITON:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def device() -> torch.device:
    """Where kernels run; tests of this folder are skipped where they cannot."""
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 in a process of its own")
    return torch.device("cpu" if INTERPRETED else "cuda")
