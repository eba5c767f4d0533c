"""Batches made ahead of their use, and copied to a GPU beside its work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from dragkit.data.packed import QuestionBatch

_ALIGN = 64
_DEPTH = 2
_END = object()

Item = TypeVar("Item")
Staged = TypeVar("Staged")


def pack_bytes(tensors: Sequence[Tensor], *, pin: bool) -> Tensor:
    """The bytes of all tensors in one, each from an aligned place: one copy to the device."""
    arrays = [tensor.contiguous().numpy().reshape(-1).view(np.uint8) for tensor in tensors]
    starts = _starts(tensors)
    joined = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pin)
    target = joined.numpy()
    for start, array in zip(starts, arrays, strict=False):
        target[start : start + len(array)] = array
    return joined


def _starts(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor begins, and the size of all."""
    sizes = (-(-tensor.nbytes // _ALIGN) * _ALIGN for tensor in tensors)
    return list(accumulate(sizes, initial=0))


def unpack_bytes(joined: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of what `pack_bytes` joined, with the shapes and dtypes of `like`."""
    places = zip(like, _starts(like), strict=False)
    return [
        joined[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, start in places
    ]


def prefetch(items: Iterable[Item], stage: Callable[[Item], Staged]) -> Iterator[Staged]:
    """The items in their order, each staged, by a thread that is two of them ahead.

    What goes wrong with an item is raised in its place. The thread ends with the iterator, however
    that ends.

    Args:
        items: may be slow to make; stage: what the thread does to each.
    """
    following = iter(items)

    def make() -> object:
        item = next(following, _END)
        return item if item is _END else stage(item)  # type: ignore[arg-type]

    thread = ThreadPoolExecutor(1, "prefetch")
    try:
        waiting = deque(thread.submit(make) for _ in range(_DEPTH))
        while (staged := waiting.popleft().result()) is not _END:
            waiting.append(thread.submit(make))
            yield staged  # type: ignore[misc]
    finally:
        thread.shutdown(cancel_futures=True)


class _Copy(NamedTuple):
    """A batch on its way to a device: its tensors' bytes there, and when they have arrived."""

    batch: QuestionBatch
    joined: Tensor
    arrived: torch.cuda.Event


class DeviceCopier:
    """Copies batches to a GPU on a stream of its own, so that they overlap with what it computes.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def begin(self, batch: QuestionBatch) -> _Copy:
        """Queues the copy of a batch in host memory; for the thread that is ahead."""
        tensors = batch.tensors()
        with torch.cuda.stream(self.stream):
            joined = pack_bytes(tensors, pin=True).to(self.device, non_blocking=True)
            return _Copy(
                batch.with_tensors(unpack_bytes(joined, tensors)),
                joined,
                self.stream.record_event(),
            )

    def finish(self, copy: _Copy) -> QuestionBatch:
        """The batch on the device; what is queued from here on waits for it, the host does not."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copy.arrived)
        # The memory belongs to the copying stream, which must not have it back before its last use.
        copy.joined.record_stream(current)
        return copy.batch
