"""The ranks of a run and the collectives between them. `torchrun.py` implements several ranks.

Every rank holds all trained parameters and takes its slice of every batch. After the last
micro-batch of an optimizer step the gradients are all-reduced in one flat float32 tensor, and all
ranks clip and step alike. `DistributedDataParallel` does not fit. Its hooks expect one backward
through one module, but phase 2 cuts its graph twice and accumulates gradients over micro-batches,
and a rank without a question in a batch has no backward at all. One all-reduce per step sends every
gradient once and sums in a fixed order. It gives up the overlap of communication and backward,
which is small because only adapters, retriever and projector are sent.

The frozen weights are replicated, or sharded between the ranks (`run.generator_fsdp`,
`dragkit.distributed.sharding`). Rank 0 holds all that a checkpoint needs and writes it.

Host values (counts, the stop flag, log entries) travel over gloo, so no rank waits for its GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from dragkit.errors import ConfigError, DragkitError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_MAX_LINES = 12
Value = TypeVar("Value")


class RankError(DragkitError):
    """Another rank failed or does not answer. `exit_code` is that of its failure, if known."""

    def __init__(self, message: str, exit_code: int = DragkitError.exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Ranks:
    """A single process, for which every collective is the identity.

    Attributes:
        rank: index of this process.
        world_size: number of processes.
        progress: position of training, such as "at step 7". Errors about other ranks quote it.
    """

    rank = 0
    world_size = 1
    progress = "at the start"

    @property
    def is_single(self) -> bool:
        """Whether there is no other rank."""
        return self.world_size == 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes all files."""
        return self.rank == 0

    def local_slices(self, batches: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """This rank's contiguous slice of every batch. A slice may be empty."""
        return [rows[slice(*self._bounds(len(rows)))] for rows in batches]

    def _bounds(self, size: int) -> tuple[int, int]:
        base, extra = divmod(size, self.world_size)
        start = self.rank * base + min(self.rank, extra)
        return start, start + base + (self.rank < extra)

    def bind_device(self, device: torch.device) -> torch.device:
        """This rank's own device, given the device that the configuration names."""
        return device

    def all_reduce_sum(self, numbers: Sequence[int]) -> list[int]:
        """Sums host integers over ranks, element by element."""
        return list(numbers)

    def all_reduce_max(self, number: int) -> int:
        """The largest value of a host integer over ranks."""
        return number

    def all_reduce_(self, tensor: Tensor) -> None:
        """Replaces a device tensor by its sum over ranks."""

    def all_reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replaces every gradient by its sum over ranks, or keeps None if all ranks have None."""

    def all_gather_object(self, value: Value) -> list[Value]:
        """Returns the values of all ranks, in rank order, on every rank."""
        return [value]

    def barrier(self) -> None:
        """Returns once every rank has called it."""

    def main_process_first(self) -> AbstractContextManager[None]:
        """Local rank 0 runs the block first. The others of its machine then use its cache."""
        return nullcontext()

    def limited_concurrency(self, size: int) -> AbstractContextManager[None]:
        """At most `size` ranks of each machine run the block at the same time."""
        return nullcontext()

    def mesh(self, device: torch.device) -> DeviceMesh:
        """A one-dimensional mesh of all ranks, on devices of this type.

        Raises:
            ConfigError: this is a single process.
        """
        raise ConfigError(
            f"a single process has no device mesh ({device}). Start several ranks with torchrun."
        )

    def require_same(self, values: Mapping[str, object]) -> None:
        """Checks that all ranks hold the same values.

        Raises:
            ConfigError: values differ. Every rank raises, and names each difference from rank 0.
        """
        gathered = self.all_gather_object(dict(values))
        lines = []
        for rank, others in enumerate(gathered):
            for key in dict.fromkeys([*gathered[0], *others]):
                expected, actual = gathered[0].get(key), others.get(key)
                if expected != actual:
                    line = f"  rank {rank}: {key} is {actual!r:.80}, rank 0 has {expected!r:.80}"
                    lines.append(line)
        if lines:
            if len(lines) > _MAX_LINES:
                lines[_MAX_LINES:] = [f"  and {len(lines) - _MAX_LINES} more"]
            raise ConfigError(
                f"{self.progress}, the ranks do not agree:\n"
                + "\n".join(lines)
                + "\nStart all of them with the same code, data, settings and weights."
            )
