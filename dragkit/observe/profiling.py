"""NVTX ranges, and the window of steps that a profiler captures."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

logger = logging.getLogger(__name__)

# Profiles that record now. Outside them `nvtx_range` skips `record_function`, which costs time.
_open_traces: list[profile] = []


@contextmanager
def nvtx_range(name: str) -> Iterator[None]:
    """A named range in nsys and in an open trace of PyTorch's profiler."""
    with record_function(name) if _open_traces else nullcontext():
        if not torch.cuda.is_available():
            yield
            return
        torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()


class ProfileWindow:
    """Starts and stops profilers at given steps (`--profile_steps a:b`).

    nsys and ncu listen to CUDA's profiler. PyTorch's profiler writes a Chrome trace, on a CPU too.
    Both at once cannot read a GPU's counters, so the trace is optional.

    Its `with` block closes a window that is still open at the end.

    Args:
        steps: "a:b" captures steps a to b-1. None captures nothing.
        trace_dir: folder of `trace-a-b.json.gz`. None writes no trace.
    """

    def __init__(self, steps: str | None, trace_dir: Path | None = None) -> None:
        start, end = steps.split(":") if steps else ("-1", "-1")
        self.start, self.end = int(start), int(end)
        self.path = None if trace_dir is None else trace_dir / f"trace-{start}-{end}.json.gz"
        self._open = False

    def __enter__(self) -> ProfileWindow:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def tick(self, step: int) -> None:
        """Starts or stops the capture. Call it before step `step` runs."""
        if step == self.start:
            self._start()
        elif step == self.end:
            self._stop()

    def _start(self) -> None:
        self._open = True
        cuda = torch.cuda.is_available()
        if self.path is not None:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
            trace = profile(activities=kinds)
            trace.start()
            _open_traces.append(trace)
        if cuda:
            torch.cuda.cudart().cudaProfilerStart()

    def _stop(self) -> None:
        if not self._open:
            return
        self._open = False
        if torch.cuda.is_available():
            # The kernels of the last step are still queued and belong to the capture.
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()
        if self.path is not None:
            trace = _open_traces.pop()
            trace.stop()
            try:
                trace.export_chrome_trace(str(self.path))
            except (OSError, RuntimeError) as error:
                # A profile is worth less than the run.
                logger.warning("%s: the profile cannot be written (%s)", self.path, error)
                return
            logger.info("profile of steps %d to %d: %s", self.start, self.end - 1, self.path)
