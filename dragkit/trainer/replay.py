"""Phase 1's step as CUDA graphs, one for each capacity that batches are padded to.

A step on small graphs is hundreds of short kernels, and launching them takes longer than running
them. A CUDA graph launches them all at once, but always on the same memory. So a batch is padded to
a capacity and copied into the graph's input buffer, and gradients are added to fixed tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dragkit.data.packed import QuestionBatch
from dragkit.data.padding import Buckets, Capacity, pad_batch
from dragkit.observe.profiling import nvtx_range
from dragkit.retriever.text_encoder import RelationStates
from dragkit.trainer.transfer import pack_bytes, unpack_bytes

logger = logging.getLogger(__name__)

WARM_UPS = 3
# Larger batches keep a GPU busy for longer than their launches take, and a graph would hold memory
# for them in addition to the rest of the training. The number is an estimate, not a measurement.
MAX_FACTS = 50_000

Work = Callable[[], None]
Capture = Callable[[Work], Work]
BatchLoss = Callable[[QuestionBatch, RelationStates], Tensor]


class CudaCapture:
    """Captures work on a device as CUDA graphs that share one memory pool.

    The graphs may share it in any order of replays: they leave their results in tensors outside of
    the pool, so nothing in the pool has to outlive a replay.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """Runs the work `WARM_UPS` times, captures it, and returns a function that replays it."""
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            # Warm-ups compile kernels and initialise libraries, which a capture cannot contain.
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UPS):
                    work()
            current.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # The prefetching thread may allocate during the capture.
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                work()
        return graph.replay


def capture_for(device: torch.device) -> Capture | None:
    """A `CudaCapture` for a GPU, or None for a CPU."""
    return CudaCapture(device) if device.type == "cuda" else None


def _preserved_rng(device: torch.device) -> AbstractContextManager:
    """Restores torch's generators at the end, so that later steps draw the same numbers."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


class _Step(NamedTuple):
    """The step on one input buffer.

    Attributes:
        inputs: uint8 bytes of the batch and of the loss's denominator.
        relations: kept alive, because a CUDA graph holds their address.
        loss: float32 [] of the last run.
    """

    inputs: Tensor
    relations: RelationStates
    loss: Tensor
    run: Work


class StepReplay:
    """Forward and backward of a loss, replayed on batches padded to a few capacities.

    Each parameter has one gradient tensor for the whole run. Where the optimizer has dropped it
    (`zero_grad`), the next step zeroes it and attaches it again. A capture leaves gradients and
    random generators unchanged, so it does not matter at which step a capacity comes first. Beyond
    `max_graphs` capacities, and for batches of more than `MAX_FACTS` facts, the step runs eagerly.

    Args:
        loss: float32 [] of a device batch.
        parameters: parameters that may get a gradient.
        buckets, capture: capacities of the batches, and what captures the step on each.
        max_graphs: number of capacities to capture.
    """

    def __init__(
        self,
        loss: BatchLoss,
        parameters: Sequence[nn.Parameter],
        buckets: Buckets,
        capture: Capture,
        *,
        max_graphs: int,
    ) -> None:
        self.loss = loss
        self.buckets, self.capture, self.max_graphs = buckets, capture, max_graphs
        self._candidates = [p for p in parameters if p.requires_grad]
        self._trained: list[nn.Parameter] | None = None
        self._grads: list[Tensor] = []
        self._captured: dict[tuple[Capacity, int], _Step] = {}

    def __call__(self, batch: QuestionBatch, relations: RelationStates, divisor: float) -> Tensor:
        """Adds the gradients of loss / divisor for a host batch and returns the detached value."""
        device, key = relations.states.device, None
        if batch.graph.num_facts <= MAX_FACTS:
            capacity = self.buckets.capacity(batch)
            # A CUDA graph reads the relations at the address that they had in its capture.
            key = (capacity, relations.states.data_ptr())
            batch = pad_batch(batch, capacity)
        step = self._captured.get(key) if key else None
        with nvtx_range("copy"):
            tensors = [*batch.tensors(), torch.tensor(divisor, dtype=torch.float32)]
            packed = pack_bytes(tensors, pin=device.type == "cuda")
            if step is not None:
                step.inputs.copy_(packed, non_blocking=True)
            else:
                packed = packed.to(device, non_blocking=True)
        if step is None:
            step = self._eager_step(batch, packed, tensors, relations)
            if key and len(self._captured) < self.max_graphs:
                step = self._captured[key] = step._replace(run=self._capture(step.run, device))
            elif key:
                _log_once(f"batches beyond {self.max_graphs} capacities (run.max_cuda_graphs)")
            else:
                _log_once(f"batches of more than {MAX_FACTS:,} facts")
        self._attach_grads()
        with nvtx_range("replay"):
            step.run()
        # The next replay overwrites the loss.
        return step.loss.clone()

    def _eager_step(
        self,
        batch: QuestionBatch,
        inputs: Tensor,
        like: Sequence[Tensor],
        relations: RelationStates,
    ) -> _Step:
        *tensors, divisor = unpack_bytes(inputs, like)
        batch = batch.with_tensors(tensors)
        loss = torch.zeros((), device=inputs.device)
        if self._trained is None:
            self._find_trained(batch, relations)

        def run() -> None:
            value = self.loss(batch, relations) / divisor
            # Not backward(): it may put new tensors into `grad`, which a CUDA graph must not hold.
            grads = torch.autograd.grad(value, self._trained)
            torch._foreach_add_(self._grads, grads)
            loss.copy_(value.detach())

        return _Step(inputs, relations, loss, run)

    def _find_trained(self, batch: QuestionBatch, relations: RelationStates) -> None:
        """Finds the parameters that the loss depends on. AdamW must not decay the others."""
        with _preserved_rng(relations.states.device):
            value = self.loss(batch, relations)
            grads = torch.autograd.grad(value, self._candidates, allow_unused=True)
        pairs = zip(self._candidates, grads, strict=True)
        self._trained = [parameter for parameter, grad in pairs if grad is not None]
        self._grads = [torch.zeros_like(parameter) for parameter in self._trained]

    def _capture(self, work: Work, device: torch.device) -> Work:
        before = [grad.clone() for grad in self._grads]
        try:
            with _preserved_rng(device):
                replay = self.capture(work)
        except RuntimeError as error:
            error.add_note("--set run.cuda_graphs=false trains without CUDA graphs")
            raise
        # The warm-ups have added their gradients.
        torch._foreach_copy_(self._grads, before)
        return replay

    def _attach_grads(self) -> None:
        """Makes each trained parameter's `grad` the fixed tensor, with the value it had."""
        cleared = []
        for parameter, grad in zip(self._trained or (), self._grads, strict=True):
            if parameter.grad is grad:
                continue
            if parameter.grad is None:
                cleared.append(grad)
            else:
                grad.copy_(parameter.grad)
            parameter.grad = grad
        if cleared:
            torch._foreach_zero_(cleared)


@cache
def _log_once(batches: str) -> None:
    logger.info("%s run without CUDA graphs", batches)
