"""Named NVTX ranges, and the window of steps that a profiler captures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def nvtx_range(name: str) -> Iterator[None]:
    """A range in an nsys trace; nothing at all on a machine without CUDA."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


class ProfileWindow:
    """Starts and stops the CUDA profiler at given steps (`--profile_steps a:b`).

    Args:
        steps: "a:b", the first step captured and the first one that is not; None captures nothing.
    """

    def __init__(self, steps: str | None) -> None:
        first, last = steps.split(":") if steps else ("-1", "-1")
        self.first, self.last = int(first), int(last)

    def tick(self, step: int) -> None:
        """To be called before step `step` runs."""
        if not torch.cuda.is_available():
            return
        if step == self.first:
            torch.cuda.cudart().cudaProfilerStart()
        elif step == self.last:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()
