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


class TorchrunRanks(Ranks):
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
        self.rank, self.world_size = _env_int("RANK"), _env_int("WORLD_SIZE")
        self.local_rank = _env_int("LOCAL_RANK", 0)
        self.local_world_size = _env_int("LOCAL_WORLD_SIZE", 1)
        self._timeout = timedelta(seconds=timeout)
        self._store = self._device_group = None
        with self._explained():
            store, _, _ = next(dist.rendezvous("env://", timeout=self._timeout))
            self._store = dist.PrefixStore("dragkit", store)
            dist.init_process_group(
                "gloo",
                store=store,
                rank=self.rank,
                world_size=self.world_size,
                timeout=self._timeout,
            )
        if not self.is_main:
            logging.getLogger().setLevel(logging.WARNING)
            for handler in logging.getLogger().handlers:
                handler.setFormatter(logging.Formatter(f"rank {self.rank}: %(message)s"))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what the library raises into the reason why another rank is gone."""
        try:
            yield
        except RuntimeError as error:
            raise self._explain(error) from error

    def peer_failure(self, error: RuntimeError) -> RankError | None:
        """What another rank has left of its failure, which may be the cause of an error here."""
        try:
            if self._store is not None and self._store.check(["failure"]):
                told = json.loads(self._store.get("failure"))
                return RankError(f"stopped {self.progress}: {told['message']}", told["code"])
        except RuntimeError as second:
            error.add_note(f"and the store does not answer: {second}")  # it died with its rank
        return None

    def _explain(self, error: RuntimeError) -> RankError:
        if (failure := self.peer_failure(error)) is not None:
            return failure
        text = " ".join(str(error).split())
        return RankError(
            f"rank {self.rank} of {self.world_size} lost the others {self.progress}: one "
            "has ended, or "
            f"did not answer within {self.timeout} s (run.rank_timeout). ({text:.200})"
        )

    def publish_failure(self, error: BaseException) -> None:
        """Leaves for the other ranks why this one ends."""
        message = f"rank {self.rank}: {str(error) or type(error).__name__}"
        code = getattr(error, "exit_code", DragkitError.exit_code)
        try:
            if not self._store.check(["failure"]):
                self._store.set("failure", json.dumps({"message": message, "code": code}))
        except RuntimeError as lost:
            logger.debug("the other ranks could not be told: %s", lost)

    def shutdown(self) -> None:
        """Ends the connection, when all ranks have come here."""
        with self._explained():
            self._dist.barrier()
            self._dist.destroy_process_group()

    def bind_device(self, device: torch.device) -> torch.device:
        """As `Ranks.bind_device`: each rank of a machine takes a GPU of its own."""
        if device.type != "cuda":
            return device
        if device.index is not None:
            raise ConfigError(
                f"run.device: {device} would be the GPU of all {self.world_size} ranks; write "
                "cuda, and "
                "each takes the one of its LOCAL_RANK."
            )
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {self.rank}: is number {self.local_rank} on its machine, which has "
                f"{torch.cuda.device_count()} GPUs. Start fewer with --nproc-per-node."
            )
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        with self._explained():
            self._device_group = self._dist.new_group(backend="nccl", timeout=self._timeout)
        return device

    def all_reduce_sum(self, numbers: Sequence[int]) -> list[int]:
        """As `Ranks.all_reduce_sum`."""
        sums = torch.tensor(list(numbers), dtype=torch.int64)
        with self._explained():
            self._dist.all_reduce(sums)
        return sums.tolist()

    def all_reduce_max(self, number: int) -> int:
        """As `Ranks.all_reduce_max`."""
        largest = torch.tensor(number)
        with self._explained():
            self._dist.all_reduce(largest, self._dist.ReduceOp.MAX)
        return int(largest)

    def all_reduce_(self, tensor: Tensor) -> None:
        """As `Ranks.all_reduce_`."""
        with self._explained():
            self._dist.all_reduce(tensor, group=self._device_group)

    def all_reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """As `Ranks.all_reduce_gradients`."""
        holders = self.all_reduce_sum([int(p.grad is not None) for p in parameters])
        with_grad = [p for p, number in zip(parameters, holders, strict=True) if number]
        if not with_grad:
            return
        flat = torch.cat(
            [
                p.new_zeros(p.numel(), dtype=torch.float32)
                if p.grad is None
                else p.grad.detach().float().reshape(-1)
                for p in with_grad
            ]
        )
        self.all_reduce_(flat)
        for parameter, summed in zip(
            with_grad, flat.split([p.numel() for p in with_grad]), strict=True
        ):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            # In place: a recorded step keeps its gradients where they are.
            parameter.grad.copy_(summed.view_as(parameter))

    def all_gather_object(self, value: Value) -> list[Value]:
        """As `Ranks.all_gather_object`."""
        gathered: list[Value] = [value] * self.world_size
        with self._explained():
            self._dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        """As `Ranks.barrier`."""
        with self._explained():
            self._dist.barrier()

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """As `Ranks.main_process_first`."""
        if self.local_rank != 0:
            self.barrier()
        yield
        if self.local_rank == 0:
            self.barrier()

    @contextmanager
    def limited_concurrency(self, size: int) -> Iterator[None]:
        """As `Ranks.limited_concurrency`; the machines may have different sizes of num_waves."""
        wave = self.local_rank // size
        num_waves = self.all_reduce_max(-(-self.local_world_size // size))
        for _ in range(wave):
            self.barrier()
        yield
        for _ in range(num_waves - wave):
            self.barrier()

    def mesh(self, device: torch.device) -> DeviceMesh:
        """As `Ranks.mesh`."""
        from torch.distributed.device_mesh import DeviceMesh

        return DeviceMesh.from_group(self._device_group or self._dist.group.WORLD, device.type)


def _env_int(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise ConfigError(
            f"{name} is {text!r}, although WORLD_SIZE is {os.environ.get('WORLD_SIZE')}: start "
            "several ranks with torchrun, or unset WORLD_SIZE for one process."
        )
    return int(text)


@contextmanager
def init_ranks(config: RunConfig) -> Iterator[Ranks]:
    """The ranks of this command: one alone, or those that `torchrun` has started.

    An error inside is left for the other ranks, which end with it at their next exchange.
    """
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        yield Ranks()
        return
    ranks = TorchrunRanks(config.rank_timeout)
    try:
        yield ranks
    except Interrupted as error:
        ranks.shutdown()
        if threading.current_thread() is threading.main_thread():
            # torchrun ends all ranks when the first one has ended; all are about to.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _prefix_rank(error, ranks)
        raise
    except BaseException as error:
        # The library exchanges weights by itself, too.
        if isinstance(error, RuntimeError) and (failure := ranks.peer_failure(error)) is not None:
            raise failure from error
        ranks.publish_failure(error)
        _prefix_rank(error, ranks)
        raise
    ranks.shutdown()


def _prefix_rank(error: BaseException, ranks: Ranks) -> None:
    """Puts the rank in front of the message of an error that all ranks may show."""
    if isinstance(error, DragkitError) and not ranks.is_main:
        error.args = (f"rank {ranks.rank}: {error}",)
