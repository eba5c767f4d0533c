"""Batches that a thread prepares and copies to a GPU while it computes on earlier ones."""

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

# Triton compiles another kernel for a pointer that is not aligned to 16 bytes.
_ALIGN_BYTES = 64
# Batches that are ready or being prepared while one is in use.
_PREFETCHED = 2
_END = object()

Item = TypeVar("Item")
Staged = TypeVar("Staged")


def _offsets(tensors: Sequence[Tensor]) -> list[int]:
    """Byte offset of each tensor, and the size of all."""
    sizes = (-(-tensor.nbytes // _ALIGN_BYTES) * _ALIGN_BYTES for tensor in tensors)
    return list(accumulate(sizes, initial=0))


def pack_bytes(tensors: Sequence[Tensor], *, pin: bool) -> Tensor:
    """Copies host tensors into one uint8 buffer, so that one copy takes them to the device.

    Each tensor begins at a multiple of 64 bytes. `pin` puts the buffer into pinned memory.
    """
    offsets = _offsets(tensors)
    # numpy copies small arrays with less overhead per call than torch.
    packed = torch.empty(offsets[-1], dtype=torch.uint8, pin_memory=pin)
    target = packed.numpy()
    for offset, tensor in zip(offsets, tensors, strict=False):
        source = tensor.contiguous().numpy().reshape(-1).view(np.uint8)
        target[offset : offset + len(source)] = source
    return packed


def unpack_bytes(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a buffer of `pack_bytes`, with the shapes and dtypes of `like`."""
    return [
        packed[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, offset in zip(like, _offsets(like), strict=False)
    ]


def prefetch(items: Iterable[Item], stage: Callable[[Item], Staged]) -> Iterator[Staged]:
    """Yields `stage(item)` for each item, in order. A thread runs two items ahead.

    An error of an item is raised in that item's place. The thread ends when the iterator is
    exhausted, closed or raises.
    """
    source = iter(items)

    def next_staged() -> object:
        item = next(source, _END)
        return item if item is _END else stage(item)  # type: ignore[arg-type]

    thread = ThreadPoolExecutor(1, "prefetch")
    try:
        pending = deque(thread.submit(next_staged) for _ in range(_PREFETCHED))
        while (staged := pending.popleft().result()) is not _END:
            pending.append(thread.submit(next_staged))
            yield staged  # type: ignore[misc]
    finally:
        thread.shutdown(cancel_futures=True)


class _Copy(NamedTuple):
    """A batch that is being copied. Its tensors are views of `packed` on the device."""

    batch: QuestionBatch
    packed: Tensor
    done: torch.cuda.Event


class DeviceCopier:
    """Copies batches to a GPU on a second stream, so that copies overlap with compute."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def start(self, batch: QuestionBatch) -> _Copy:
        """Queues the copy of a host batch. The prefetching thread calls this."""
        tensors = batch.tensors()
        with torch.cuda.stream(self.stream):
            packed = pack_bytes(tensors, pin=True).to(self.device, non_blocking=True)
            on_device = batch.with_tensors(unpack_bytes(packed, tensors))
            return _Copy(on_device, packed, self.stream.record_event())

    def finish(self, copy: _Copy) -> QuestionBatch:
        """The batch on the device. The current stream waits for the copy, the host does not."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copy.done)
        # The memory belongs to the copy stream, which must not reuse it before its last use here.
        copy.packed.record_stream(current)
        return copy.batch
