"""Ranks as `torchrun` starts them, which talk to one another over `torch.distributed`."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dragkit.config import RunConfig
from dragkit.distributed.ranks import RankError, Ranks, Value
from dragkit.errors import ConfigError, DragkitError, Interrupted

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger(__name__)


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
        self.on_machine = _variable("LOCAL_WORLD_SIZE", 1)
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

    def failure(self, error: RuntimeError) -> RankError | None:
        """What another rank has left of its failure, which may be the cause of an error here."""
        try:
            if self._store is not None and self._store.check(["failure"]):
                told = json.loads(self._store.get("failure"))
                return RankError(f"stopped {self.place}: {told['message']}", told["code"])
        except RuntimeError as second:
            error.add_note(f"and the store does not answer: {second}")  # it died with its rank
        return None

    def _lost(self, error: RuntimeError) -> RankError:
        if (failure := self.failure(error)) is not None:
            return failure
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

    def most(self, number: int) -> int:
        """As `Ranks.most`."""
        largest = torch.tensor(number)
        with self._guard():
            self._dist.all_reduce(largest, self._dist.ReduceOp.MAX)
        return int(largest)

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

    def gather(self, value: Value) -> list[Value]:
        """As `Ranks.gather`."""
        everyone: list[Value] = [value] * self.count
        with self._guard():
            self._dist.all_gather_object(everyone, value)
        return everyone

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

    @contextmanager
    def in_waves(self, size: int) -> Iterator[None]:
        """As `Ranks.in_waves`; the machines may have different sizes of waves."""
        own = self.local // size
        waves = self.most(-(-self.on_machine // size))
        for _ in range(own):
            self.wait()
        yield
        for _ in range(waves - own):
            self.wait()

    def mesh(self, device: torch.device) -> DeviceMesh:
        """As `Ranks.mesh`."""
        from torch.distributed.device_mesh import DeviceMesh

        return DeviceMesh.from_group(self._group or self._dist.group.WORLD, device.type)


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
        # The library exchanges weights by itself, too.
        if isinstance(error, RuntimeError) and (failure := ranks.failure(error)) is not None:
            raise failure from error
        ranks.tell(error)
        _sign(error, ranks)
        raise
    ranks.leave()


def _sign(error: BaseException, ranks: Ranks) -> None:
    """Puts the rank in front of the message of an error that all ranks may show."""
    if isinstance(error, DragkitError) and not ranks.first:
        error.args = (f"rank {ranks.index}: {error}",)
