"""Kernels against their references: interpreted under TRITON_INTERPRET=1, else on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from dragkit_kernels.backend import HAS_TRITON, INTERPRETED

if not HAS_TRITON:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def device() -> torch.device:
    """Where kernels run; tests of this folder are skipped where they cannot."""
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 in a process of its own")
    return torch.device("cpu" if INTERPRETED else "cuda")
