"""Questions, facts and tokens per second, and peak memory, since the last reading."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Throughput:
    """One reading. Rates are per second of wall time, `step_ms` is the mean."""

    questions_per_s: float
    facts_per_s: float
    tokens_per_s: float
    step_ms: float
    peak_mem_gib: float


def peak_memory_gib(device: torch.device) -> float:
    """Peak allocated memory of the GPU, or the process's peak resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # ru_maxrss is in bytes on macOS and in KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class ThroughputMeter:
    """Sums the work of training steps. `read` gives the rates since the last reading."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._reset()

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._steps = self._questions = self._facts = self._tokens = 0

    def add(self, questions: int, facts: int, tokens: int) -> None:
        """Counts one step's work."""
        self._steps += 1
        self._questions += questions
        self._facts += facts
        self._tokens += tokens

    def read(self) -> Throughput:
        """Rates since the last call."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        reading = Throughput(
            questions_per_s=self._questions / seconds,
            facts_per_s=self._facts / seconds,
            tokens_per_s=self._tokens / seconds,
            step_ms=1e3 * seconds / max(self._steps, 1),
            peak_mem_gib=peak_memory_gib(self.device),
        )
        self._reset()
        return reading
