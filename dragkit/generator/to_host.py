"""Copies of numbers between host and device that block only where their result is read."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class AsyncToHost:
    """An asynchronous copy of numbers from a device to the host.

    The constructor queues the copy. `result` waits for the copy, and not for work that was queued
    after it.

    Args:
        values: numbers of any shape.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if values.is_cuda:
            # Only a copy into pinned memory is asynchronous.
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(values.device))

    def result(self) -> list:
        """The numbers, in lists nested like the tensor."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


def to_device(device: torch.device, *arrays: np.ndarray) -> tuple[Tensor, ...]:
    """One-dimensional int64 arrays on the device, by one copy for which the host does not wait."""
    sizes = [len(array) for array in arrays]
    buffer = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    np.concatenate(arrays, out=buffer.numpy())
    return buffer.to(device, non_blocking=True).split(sizes)
