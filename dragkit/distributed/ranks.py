"""Several processes (ranks) that train one model; those of `torchrun` are in `torchrun.py`.

Every rank holds all that is trained and takes its slice of every batch. Once per optimizer step,
when all micro-batches are done, the gradients of the trained parameters are added up over the ranks
in one flat float32 tensor; all ranks then clip and step alike. `DistributedDataParallel` is not
used: its hooks expect one backward pass through one module, while phase 2 cuts its graph twice,
runs the generator in micro-batches and adds up gradients over passes; and a rank with no question
in a batch has no backward pass at all. One sum at the step needs no such care, sends what is to be
sent once however many micro-batches there are, and always adds in the same order. What is lost is
the overlap of sending and computing, which is little where adapters are all that is sent.

The frozen weights are on every rank, or cut between the ranks (`run.generator_fsdp`,
`dragkit.distributed.sharding`). Either way the first rank holds what a checkpoint needs and writes
it. `torch.distributed.checkpoint` writes the parts of tensors that no rank holds whole. Here it
would only give checkpoints a second form.

Host values (counts, the stop flag, log entries) go over gloo, so that no rank waits for its device.
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
    """Another rank failed or does not answer; `exit_code` is that of its failure, if known."""

    def __init__(self, message: str, exit_code: int = DragkitError.exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Ranks:
    """One process alone: every method does what several ranks would do, and sends nothing.

    Attributes:
        rank: of this process; world_size: of all.
        progress: where training stands, for messages about lost ranks.
    """

    rank = 0
    world_size = 1
    progress = "at the start"

    @property
    def is_single(self) -> bool:
        """Whether there are no other ranks."""
        return self.world_size == 1

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def local_slices(self, batches: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """This rank's slice of every batch; some may be empty, together they are the batch."""
        return [rows[slice(*self._bounds(len(rows)))] for rows in batches]

    def _bounds(self, size: int) -> tuple[int, int]:
        base, extra = divmod(size, self.world_size)
        start = self.rank * base + min(self.rank, extra)
        return start, start + base + (self.rank < extra)

    def bind_device(self, device: torch.device) -> torch.device:
        """The device of this rank, given what the configuration asks for."""
        return device

    def all_reduce_sum(self, numbers: Sequence[int]) -> list[int]:
        """Sums over ranks of host integers."""
        return list(numbers)

    def all_reduce_max(self, number: int) -> int:
        """The largest of a host integer over ranks."""
        return number

    def all_reduce_(self, tensor: Tensor) -> None:
        """Replaces a tensor on the device by its sum over ranks."""

    def all_reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replaces every gradient by its sum over ranks; none stays none where no rank has one."""

    def all_gather_object(self, value: Value) -> list[Value]:
        """The values of all ranks, in their order, on every rank."""
        return [value]

    def barrier(self) -> None:
        """Returns when all ranks have come here."""

    def main_process_first(self) -> AbstractContextManager[None]:
        """The first rank of each machine inside before the others, so that they find its files."""
        return nullcontext()

    def limited_concurrency(self, size: int) -> AbstractContextManager[None]:
        """So many ranks of each machine inside at a time."""
        return nullcontext()

    def mesh(self, device: torch.device) -> DeviceMesh:
        """The ranks in one dimension, on devices of a kind, for what libraries distribute.

        Raises:
            ConfigError: this process is alone.
        """
        raise ConfigError(f"{device}: a process alone has nothing to distribute over.")

    def require_same(self, values: Mapping[str, object]) -> None:
        """Sees to it that all ranks have the same values.

        Raises:
            ConfigError: on every rank, naming the ranks that differ from the first.
        """
        gathered = self.all_gather_object(dict(values))
        lines = []
        for index, other in enumerate(gathered):
            for key in dict.fromkeys([*gathered[0], *other]):
                expected, actual = gathered[0].get(key), other.get(key)
                if expected != actual:
                    lines.append(
                        f"  rank {index}: {key} is {actual!r:.80}, rank 0 has {expected!r:.80}"
                    )
        if lines:
            extra = [f"  and {len(lines) - _MAX_LINES} more"] if len(lines) > _MAX_LINES else []
            raise ConfigError(
                f"{self.progress}, the ranks do not agree:\n"
                + "\n".join(lines[:_MAX_LINES] + extra)
                + "\nStart all of them with the same code, data, settings and weights."
            )
