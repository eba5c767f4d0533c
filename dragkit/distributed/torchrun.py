"""Ranks that `torchrun` starts and that communicate over `torch.distributed`."""

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
    """One rank of several, configured by the environment variables that `torchrun` sets.

    Args:
        timeout: seconds that a collective waits for the other ranks.

    Raises:
        ConfigError: an environment variable is missing or is not a number.
        RankError: the other ranks did not join in time.
    """

    def __init__(self, timeout: int) -> None:
        # A single process never imports torch.distributed.
        import torch.distributed as dist

        self._dist, self._timeout = dist, timedelta(seconds=timeout)
        self.rank, self.world_size = _env_int("RANK"), _env_int("WORLD_SIZE")
        self.local_rank = _env_int("LOCAL_RANK", 0)
        self.local_world_size = _env_int("LOCAL_WORLD_SIZE", 1)
        # Without an NCCL group, device tensors go over the default group, which is gloo.
        self._store = self._device_group = None
        with self._translate_errors():
            store, rank, world_size = next(dist.rendezvous("env://", timeout=self._timeout))
            self._store = dist.PrefixStore("dragkit", store)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=world_size, timeout=self._timeout
            )
        if not self.is_main:
            logging.getLogger().setLevel(logging.WARNING)
            for handler in logging.getLogger().handlers:
                handler.setFormatter(logging.Formatter(f"rank {self.rank}: %(message)s"))

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Turns a RuntimeError of torch.distributed into a RankError that says what happened."""
        try:
            yield
        except RuntimeError as error:
            if (failure := self.peer_failure(error)) is not None:
                raise failure from error
            text = " ".join(str(error).split())
            seconds = int(self._timeout.total_seconds())
            raise RankError(
                f"rank {self.rank} of {self.world_size} lost the others {self.progress}: one has "
                f"ended, or did not answer within {seconds} s (run.rank_timeout). ({text:.200})"
            ) from error

    def peer_failure(self, error: RuntimeError) -> RankError | None:
        """The failure that another rank has published, or None if there is none.

        Args:
            error: raised on this rank. It gets a note if the store does not answer either.
        """
        try:
            if self._store is not None and self._store.check(["failure"]):
                failure = json.loads(self._store.get("failure"))
                return RankError(f"stopped {self.progress}: {failure['message']}", failure["code"])
        except RuntimeError as store_error:
            # The store lives in rank 0 and ends with it.
            error.add_note(f"and the store does not answer: {store_error}")
        return None

    def publish_failure(self, error: BaseException) -> None:
        """Stores the reason why this rank ends. The other ranks raise it at their next collective.

        The first published failure stays.
        """
        message = f"rank {self.rank}: {str(error) or type(error).__name__}"
        code = getattr(error, "exit_code", DragkitError.exit_code)
        try:
            if not self._store.check(["failure"]):
                self._store.set("failure", json.dumps({"message": message, "code": code}))
        except RuntimeError as store_error:
            logger.debug("this failure could not be sent to the other ranks: %s", store_error)

    def shutdown(self) -> None:
        """Waits for all ranks and destroys the process groups."""
        with self._translate_errors():
            self._dist.barrier()
            self._dist.destroy_process_group()

    def bind_device(self, device: torch.device) -> torch.device:
        """Makes GPU number LOCAL_RANK current and starts NCCL on it. See `Ranks.bind_device`.

        Raises:
            ConfigError: the configuration names one GPU, or the machine has too few.
        """
        if device.type != "cuda":
            return device
        if device.index is not None:
            raise ConfigError(
                f"run.device: all {self.world_size} ranks would share {device}. Write cuda: each "
                "rank then takes the GPU of its LOCAL_RANK."
            )
        if self.local_rank >= (num_gpus := torch.cuda.device_count()):
            raise ConfigError(
                f"rank {self.rank} has LOCAL_RANK {self.local_rank}, but this machine has "
                f"{num_gpus} GPU{'s' * (num_gpus != 1)}. Start fewer ranks with --nproc-per-node."
            )
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        with self._translate_errors():
            self._device_group = self._dist.new_group(backend="nccl", timeout=self._timeout)
        return device

    def all_reduce_sum(self, numbers: Sequence[int]) -> list[int]:
        # A CPU tensor goes over gloo, so the host does not wait for its GPU.
        sums = torch.tensor(list(numbers), dtype=torch.int64)
        with self._translate_errors():
            self._dist.all_reduce(sums)
        return sums.tolist()

    def all_reduce_max(self, number: int) -> int:
        largest = torch.tensor(number)
        with self._translate_errors():
            self._dist.all_reduce(largest, self._dist.ReduceOp.MAX)
        return int(largest)

    def all_reduce_(self, tensor: Tensor) -> None:
        with self._translate_errors():
            self._dist.all_reduce(tensor, group=self._device_group)

    def all_reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        # Ranks may differ in which gradients they have, but all must send the same flat tensor.
        num_holders = self.all_reduce_sum([int(p.grad is not None) for p in parameters])
        reduced = [p for p, number in zip(parameters, num_holders, strict=True) if number]
        if not reduced:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in reduced]
        flat = torch.cat([grad.float().reshape(-1) for grad in grads])
        self.all_reduce_(flat)
        for parameter, total in zip(reduced, flat.split([p.numel() for p in reduced]), strict=True):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            # In place: a CUDA graph replays into the gradient tensors that it captured.
            parameter.grad.copy_(total.view_as(parameter))

    def all_gather_object(self, value: Value) -> list[Value]:
        gathered: list[Value] = [value] * self.world_size
        with self._translate_errors():
            self._dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        with self._translate_errors():
            self._dist.barrier()

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        if self.local_rank != 0:
            self.barrier()
        yield
        if self.local_rank == 0:
            self.barrier()

    @contextmanager
    def limited_concurrency(self, size: int) -> Iterator[None]:
        wave = self.local_rank // size
        # `size` may differ between machines. Every rank calls as many barriers as the machine with
        # the most waves needs.
        num_waves = self.all_reduce_max(-(-self.local_world_size // size))
        for _ in range(wave):
            self.barrier()
        yield
        for _ in range(num_waves - wave):
            self.barrier()

    def mesh(self, device: torch.device) -> DeviceMesh:
        from torch.distributed.device_mesh import DeviceMesh

        return DeviceMesh.from_group(self._device_group or self._dist.group.WORLD, device.type)


def _env_int(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise ConfigError(
            f"the environment variable {name} is {text!r}, but WORLD_SIZE is "
            f"{os.environ.get('WORLD_SIZE')}. Start several ranks with torchrun, or unset "
            "WORLD_SIZE to train in one process."
        )
    return int(text)


@contextmanager
def init_ranks(config: RunConfig) -> Iterator[Ranks]:
    """The ranks of this command: a single process, or the ranks that `torchrun` has started.

    An error inside the block is published to the other ranks, which raise it at their next
    collective.

    Raises:
        ConfigError: the environment of `torchrun` is incomplete.
        RankError: another rank failed, or did not answer.
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
            # torchrun sends SIGTERM to all ranks when the first one ends. All are about to end.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _prefix_rank(error, ranks)
        raise
    except BaseException as error:
        # FSDP calls torch.distributed directly, so its errors did not pass `_translate_errors`.
        if isinstance(error, RuntimeError) and (failure := ranks.peer_failure(error)) is not None:
            raise failure from error
        ranks.publish_failure(error)
        _prefix_rank(error, ranks)
        raise
    ranks.shutdown()


def _prefix_rank(error: BaseException, ranks: Ranks) -> None:
    if isinstance(error, DragkitError) and not ranks.is_main:
        error.args = (f"rank {ranks.rank}: {error}",)
