"""Several processes (ranks) that train one model, as `torchrun` starts them.

Every rank holds the whole model and takes its slice of every batch. Once per optimizer step, when
all micro-batches are done, the gradients of the trained parameters are added up over the ranks in
one flat float32 tensor; all ranks then clip and step alike. `DistributedDataParallel` is not used:
its hooks expect one backward pass through one module, while phase 2 cuts its graph twice, runs the
generator in micro-batches and adds up gradients over passes; and a rank with no question in a batch
has no backward pass at all. One sum at the step needs no such care, sends what is to be sent once
however many micro-batches there are, and always adds in the same order. What is lost is the overlap
of sending and computing, which is little where adapters are all that is sent.

Host integers (counts, the stop flag) go over gloo, so that no rank waits for its device. Values
travel as JSON; nothing is unpickled.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch
from torch import Tensor, nn

from dragkit.config import RunConfig
from dragkit.errors import ConfigError, DragkitError, Interrupted
from dragkit.trainer.checkpoint import JSON

logger = logging.getLogger(__name__)

_SHOWN = 12


class RankError(DragkitError):
    """Another rank failed or does not answer; `exit_code` is that of its failure, if known."""

    def __init__(self, message: str, exit_code: int = DragkitError.exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Ranks:
    """One process alone: every method does what several ranks would do, and sends nothing.

    Attributes:
        index: of this rank; count: of all ranks.
        place: where training stands, for messages about lost ranks.
    """

    index = 0
    count = 1
    place = "at the start"

    @property
    def alone(self) -> bool:
        """Whether there are no other ranks."""
        return self.count == 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.index == 0

    def share(self, batches: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """This rank's slice of every batch; some may be empty, together they are the batch."""
        return [rows[slice(*self._bounds(len(rows)))] for rows in batches]

    def _bounds(self, size: int) -> tuple[int, int]:
        each, more = divmod(size, self.count)
        start = self.index * each + min(self.index, more)
        return start, start + each + (self.index < more)

    def use(self, device: torch.device) -> torch.device:
        """The device of this rank, given what the configuration asks for."""
        return device

    def total(self, numbers: Sequence[int]) -> list[int]:
        """Sums over ranks of host integers."""
        return list(numbers)

    def add(self, tensor: Tensor) -> None:
        """Replaces a tensor on the device by its sum over ranks."""

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replaces every gradient by its sum over ranks; none stays none where no rank has one."""

    def gather(self, value: JSON) -> list[JSON]:
        """The values of all ranks, in their order, on every rank."""
        return [value]

    def wait(self) -> None:
        """Returns when all ranks have come here."""

    def in_turn(self) -> AbstractContextManager[None]:
        """The first rank of each machine inside before the others, so that they find its files."""
        return nullcontext()

    def require_same(self, values: Mapping[str, JSON]) -> None:
        """Sees to it that all ranks have the same values.

        Raises:
            ConfigError: on every rank, naming the ranks that differ from the first.
        """
        everyone = self.gather(dict(values))
        lines = []
        for index, other in enumerate(everyone):
            for key in dict.fromkeys([*everyone[0], *other]):
                ours, theirs = everyone[0].get(key), other.get(key)
                if ours != theirs:
                    lines.append(
                        f"  rank {index}: {key} is {theirs!r:.80}, rank 0 has {ours!r:.80}"
                    )
        if lines:
            more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
            raise ConfigError(
                f"{self.place}, the ranks do not agree:\n"
                + "\n".join(lines[:_SHOWN] + more)
                + "\nStart all of them with the same code, data, settings and weights."
            )


class ManyRanks(Ranks):
    """Ranks that talk over `torch.distributed`, from the variables that `torchrun` sets.

    Args:
        timeout: seconds after which a rank that does not answer is given up.

    Raises:
        RankError: the others did not come.
    """

    def __init__(self, timeout: int) -> None:
        # Imported here, so that a process alone does without.
        import torch.distributed as dist

        self._dist, self.timeout = dist, timeout
        self.index, self.count = _variable("RANK"), _variable("WORLD_SIZE")
        self.local = _variable("LOCAL_RANK", 0)
        self._limit = timedelta(seconds=timeout)
        self._store = self._group = None
        with self._guard():
            store, _, _ = next(dist.rendezvous("env://", timeout=self._limit))
            self._store = dist.PrefixStore("dragkit", store)
            dist.init_process_group(
                "gloo", store=store, rank=self.index, world_size=self.count, timeout=self._limit
            )
        if not self.first:
            logging.getLogger().setLevel(logging.WARNING)
            for handler in logging.getLogger().handlers:
                handler.setFormatter(logging.Formatter(f"rank {self.index}: %(message)s"))

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Turns what the library raises into the reason why another rank is gone."""
        try:
            yield
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> RankError:
        try:
            if self._store is not None and self._store.check(["failure"]):
                failure = json.loads(self._store.get("failure"))
                return RankError(f"stopped {self.place}: {failure['message']}", failure["code"])
        except RuntimeError as second:
            error.add_note(f"and the store does not answer: {second}")  # it died with its rank
        text = " ".join(str(error).split())
        return RankError(
            f"rank {self.index} of {self.count} lost the others {self.place}: one has ended, or "
            f"did not answer within {self.timeout} s (run.rank_timeout). ({text:.200})"
        )

    def tell(self, error: BaseException) -> None:
        """Leaves for the other ranks why this one ends."""
        message = f"rank {self.index}: {str(error) or type(error).__name__}"
        code = getattr(error, "exit_code", DragkitError.exit_code)
        try:
            if not self._store.check(["failure"]):
                self._store.set("failure", json.dumps({"message": message, "code": code}))
        except RuntimeError as lost:
            logger.debug("the other ranks could not be told: %s", lost)

    def leave(self) -> None:
        """Ends the connection, when all ranks have come here."""
        with self._guard():
            self._dist.barrier()
            self._dist.destroy_process_group()

    def use(self, device: torch.device) -> torch.device:
        """As `Ranks.use`: each rank of a machine takes a GPU of its own."""
        if device.type != "cuda":
            return device
        if device.index is not None:
            raise ConfigError(
                f"run.device: {device} would be the GPU of all {self.count} ranks; write cuda, and "
                "each takes the one of its LOCAL_RANK."
            )
        if self.local >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {self.index}: is number {self.local} on its machine, which has "
                f"{torch.cuda.device_count()} GPUs. Start fewer with --nproc-per-node."
            )
        device = torch.device("cuda", self.local)
        torch.cuda.set_device(device)
        with self._guard():
            self._group = self._dist.new_group(backend="nccl", timeout=self._limit)
        return device

    def total(self, numbers: Sequence[int]) -> list[int]:
        """As `Ranks.total`."""
        sums = torch.tensor(list(numbers), dtype=torch.int64)
        with self._guard():
            self._dist.all_reduce(sums)
        return sums.tolist()

    def add(self, tensor: Tensor) -> None:
        """As `Ranks.add`."""
        with self._guard():
            self._dist.all_reduce(tensor, group=self._group)

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """As `Ranks.add_gradients`."""
        have = self.total([int(p.grad is not None) for p in parameters])
        chosen = [p for p, number in zip(parameters, have, strict=True) if number]
        if not chosen:
            return
        flat = torch.cat(
            [
                p.new_zeros(p.numel(), dtype=torch.float32)
                if p.grad is None
                else p.grad.detach().float().reshape(-1)
                for p in chosen
            ]
        )
        self.add(flat)
        for parameter, piece in zip(chosen, flat.split([p.numel() for p in chosen]), strict=True):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            # In place: a recorded step keeps its gradients where they are.
            parameter.grad.copy_(piece.view_as(parameter))

    def gather(self, value: JSON) -> list[JSON]:
        """As `Ranks.gather`."""
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        size = torch.tensor([len(own)])
        sizes = [torch.empty_like(size) for _ in range(self.count)]
        with self._guard():
            self._dist.all_gather(sizes, size)
            padded = torch.zeros(max(int(s) for s in sizes), dtype=torch.uint8)
            padded[: len(own)] = own
            parts = [torch.empty_like(padded) for _ in range(self.count)]
            self._dist.all_gather(parts, padded)
        return [
            json.loads(part[: int(size)].numpy().tobytes())
            for part, size in zip(parts, sizes, strict=True)
        ]

    def wait(self) -> None:
        """As `Ranks.wait`."""
        with self._guard():
            self._dist.barrier()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """As `Ranks.in_turn`."""
        if self.local != 0:
            self.wait()
        yield
        if self.local == 0:
            self.wait()


def _variable(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise ConfigError(
            f"{name} is {text!r}, although WORLD_SIZE is {os.environ.get('WORLD_SIZE')}: start "
            "several ranks with torchrun, or unset WORLD_SIZE for one process."
        )
    return int(text)


@contextmanager
def joined(config: RunConfig) -> Iterator[Ranks]:
    """The ranks of this command: one alone, or those that `torchrun` has started.

    An error inside is left for the other ranks, which end with it at their next exchange.
    """
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        yield Ranks()
        return
    ranks = ManyRanks(config.rank_timeout)
    try:
        yield ranks
    except Interrupted as error:
        ranks.leave()
        if threading.current_thread() is threading.main_thread():
            # torchrun ends all ranks when the first one has ended; all are about to.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _sign(error, ranks)
        raise
    except BaseException as error:
        ranks.tell(error)
        _sign(error, ranks)
        raise
    ranks.leave()


def _sign(error: BaseException, ranks: Ranks) -> None:
    """Puts the rank in front of the message of an error that all ranks may show."""
    if isinstance(error, DragkitError) and not ranks.first:
        error.args = (f"rank {ranks.index}: {error}",)
