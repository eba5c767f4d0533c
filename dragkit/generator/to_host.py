"""Numbers between host and device that nobody waits for before they are needed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class AsyncToHost:
    """Integers of a device on their way to the host.

    The copy is queued at once; `result` returns when it is done, not when the device has done all
    that was queued after it.

    Args:
        numbers: int, any shape.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._done = numbers, None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(numbers.device))

    def result(self) -> list:
        """The integers, nested in lists like the tensor."""
        if self._done is not None:
            self._done.synchronize()
        return self._numbers.tolist()


def to_device(device: torch.device, *arrays: np.ndarray) -> tuple[Tensor, ...]:
    """int64 arrays of one axis on the device, by one copy that the host does not wait for."""
    sizes = [len(array) for array in arrays]
    joined = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    np.concatenate(arrays, out=joined.numpy())
    return joined.to(device, non_blocking=True).split(sizes)
