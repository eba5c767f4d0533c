"""The step of phase 1 as recorded work: one CUDA graph for each capacity, replayed on padded packs.

A step on small graphs is hundreds of short kernels, and launching them takes longer than they run.
A graph launches them all at once, but always on the same memory: so a batch is padded to a capacity
and copied into the graph's own buffers, and gradients are added into tensors that stay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

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
# for them beside what the rest of the training uses. An estimate, not a measurement.
MAX_FACTS = 50_000

Work = Callable[[], None]
Capture = Callable[[Work], Work]


class CudaCapture:
    """Records work on a device as a CUDA graph; all graphs share one pool of memory.

    Sharing is safe in any order of replays, since recorded work leaves its results in tensors that
    it did not make: what it allocates is of no use once it has run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """Runs the work a few times, records it without running it, and returns what replays it.

        The first runs compile kernels and set up libraries, which must not be recorded.
        """
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UPS):
                    work()
            current.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate meanwhile.
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                work()
        return graph.replay


def capture_for(device: torch.device) -> Capture | None:
    """What records work on a device; None where there are no CUDA graphs."""
    return CudaCapture(device) if device.type == "cuda" else None


def _same_random_numbers(device: torch.device) -> AbstractContextManager:
    """Puts the generators back, so that what runs inside draws nothing from later steps."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Buffers of one size and the work on them.

    Attributes:
        inputs: bytes of the batch and the divisor; relations: kept so that their address stays.
        loss: float32 [] of the last run.
        run: does the work, recorded or not.
    """

    inputs: Tensor
    relations: RelationStates
    loss: Tensor
    run: Work


class StepReplay:
    """Forward and backward of a loss, replayed on batches padded to a few capacities.

    The gradient of a parameter is one tensor for the whole run, that every step adds to; where the
    optimizer has dropped it (`zero_grad`), it is cleared and put back. Recording leaves gradients
    and random numbers as they were, so that it does not matter when a capacity comes first. Beyond
    `max_graphs` capacities the same step runs on padded batches without being recorded.

    Args:
        loss: of a batch on the device and the relations, float32 [].
        parameters: those that may get a gradient.
        buckets: capacities of the batches; capture: records work.
        max_graphs: most capacities to record.
    """

    def __init__(
        self,
        loss: Callable[[QuestionBatch, RelationStates], Tensor],
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
        self._gradients: list[Tensor] = []
        self._recorded: dict[tuple[Capacity, int], _Prepared] = {}
        self._told: set[str] = set()

    def __call__(self, batch: QuestionBatch, relations: RelationStates, divisor: float) -> Tensor:
        """Adds the gradients of loss / divisor; returns that, detached.

        Args:
            batch: in host memory, not padded; relations: on the device.
        """
        device, key = relations.states.device, None
        if batch.graph.num_facts <= MAX_FACTS:
            capacity = self.buckets.capacity(batch)
            key = (capacity, relations.states.data_ptr())
            batch = pad_batch(batch, capacity)
        with nvtx_range("copy"):
            tensors = [*batch.tensors(), torch.tensor(divisor, dtype=torch.float32)]
            inputs = pack_bytes(tensors, pin=device.type == "cuda")
            prepared = self._recorded.get(key) if key else None
            if prepared is not None:
                prepared.inputs.copy_(inputs, non_blocking=True)
            else:
                inputs = inputs.to(device, non_blocking=True)
        if prepared is None:
            prepared = self._prepare(batch, inputs, tensors, relations)
            if key and len(self._recorded) < self.max_graphs:
                prepared = replace(prepared, run=self._record(prepared.run, device))
                self._recorded[key] = prepared
            else:
                self._tell_unrecorded(large=key is None)
        self._attach_gradients()
        with nvtx_range("replay"):
            prepared.run()
        return prepared.loss.clone()

    def _prepare(
        self,
        batch: QuestionBatch,
        inputs: Tensor,
        like: Sequence[Tensor],
        relations: RelationStates,
    ) -> _Prepared:
        """The work on one set of buffers, not yet recorded."""
        *tensors, divisor = unpack_bytes(inputs, like)
        batch = batch.with_tensors(tensors)
        loss = torch.zeros((), device=inputs.device)
        if self._trained is None:
            self._find_trained(batch, relations)

        def run() -> None:
            value = self.loss(batch, relations) / divisor
            found = torch.autograd.grad(value, self._trained)
            torch._foreach_add_(self._gradients, found)
            loss.copy_(value.detach())

        return _Prepared(inputs, relations, loss, run)

    def _find_trained(self, batch: QuestionBatch, relations: RelationStates) -> None:
        """Parameters that the loss depends on; the optimizer has to pass over the others."""
        with _same_random_numbers(relations.states.device):
            value = self.loss(batch, relations)
            found = torch.autograd.grad(value, self._candidates, allow_unused=True)
        pairs = zip(self._candidates, found, strict=True)
        self._trained = [p for p, gradient in pairs if gradient is not None]
        self._gradients = [torch.zeros_like(p) for p in self._trained]

    def _record(self, work: Work, device: torch.device) -> Work:
        """What replays the work; gradients and random numbers are as before."""
        kept = [gradient.clone() for gradient in self._gradients]
        try:
            with _same_random_numbers(device):
                replay = self.capture(work)
        except RuntimeError as error:
            error.add_note("--set run.cuda_graphs=false trains without CUDA graphs")
            raise
        torch._foreach_copy_(self._gradients, kept)
        return replay

    def _attach_gradients(self) -> None:
        """Every trained parameter has its own gradient tensor, with what it had in another."""
        cleared = []
        for parameter, own in zip(self._trained or (), self._gradients, strict=True):
            if parameter.grad is own:
                continue
            if parameter.grad is None:
                cleared.append(own)
            else:
                own.copy_(parameter.grad)
            parameter.grad = own
        if cleared:
            torch._foreach_zero_(cleared)

    def _tell_unrecorded(self, *, large: bool) -> None:
        """Says once of either kind why a batch runs without a graph."""
        reason = f"of more than {MAX_FACTS:,} facts"
        if not large:
            reason = f"beyond the first {self.max_graphs} sizes (run.max_cuda_graphs)"
        text = f"batches {reason} run without CUDA graphs"
        if text not in self._told:
            self._told.add(text)
            logger.info(text)
