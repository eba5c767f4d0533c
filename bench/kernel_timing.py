"""Interleaved timing of a problem's contenders, and the table with what the hardware allows."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch.profiler import ProfilerActivity, profile

from bench.kernel_checks import Step, agreement, find_truth, make_step, tolerances
from bench.kernel_ways import Contender, Problem
from bench.measure import spread
from bench.tables import KernelComparison, KernelTiming

# A repeat on a CPU lasts at least so long; on CUDA one call is one repeat.
_REPEAT_MS = 4.0
# More than any L2 cache holds.
_FLUSH_BYTES = 256 << 20
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}
_LAUNCH = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
_MIN_CUDA_REPEATS, _MIN_CPU_REPEATS, _CPU_SECONDS = 20, 5, 15.0


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large copy, bytes read and written, the median of nine."""
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = _Clock(lambda: target.copy_(source), device, calls=1)
    for _ in range(11):
        clock()
    return 2 * source.nbytes / statistics.median(clock.ms[2:]) / 1e6


class _Clock:
    """Runs one repeat of a step and keeps its times of one call, in milliseconds."""

    def __init__(self, step: Callable[[], object], device: torch.device, calls: int) -> None:
        self.step, self.device, self.calls = step, device, calls
        self.ms: list[float] = []
        self.host_ms: list[float] = []

    def __call__(self) -> None:
        if self.device.type == "cuda":
            self._on_cuda()
            return
        wall, used = time.perf_counter(), time.process_time()
        for _ in range(self.calls):
            self.step()
        self.ms.append((time.perf_counter() - wall) * 1e3 / self.calls)
        self.host_ms.append((time.process_time() - used) * 1e3 / self.calls)

    def _on_cuda(self) -> None:
        torch.cuda.synchronize()
        wall = time.perf_counter()
        self.step()
        torch.cuda.synchronize()
        self.host_ms.append((time.perf_counter() - wall) * 1e3)
        # Filling memory evicts the L2 cache, and keeps the device busy while the host gets ahead.
        torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=self.device).zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.step()
        end.record()
        torch.cuda.synchronize()
        self.ms.append(start.elapsed_time(end))


def _launches(step: Step, device: torch.device) -> int | None:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as run:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    events = run.events() or ()
    if device.type == "cuda":
        return sum(event.name.startswith(_LAUNCH) for event in events) or None
    return sum(event.name.startswith("aten::") and not event.cpu_children for event in events)


def _peak_mb(step: Step, device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _clock(step: Step, device: torch.device) -> tuple[_Clock, float]:
    """The clock of a step that has run before, and the milliseconds of one repeat.

    On a CPU a repeat is as many calls as it takes to last long enough.
    """
    clock = _Clock(step, device, calls=1)
    clock()
    ms = clock.ms[0]
    calls = 1 if device.type == "cuda" else max(1, min(500, math.ceil(_REPEAT_MS / ms)))
    return _Clock(step, device, calls), calls * ms


def _repeats(round_ms: float, device: torch.device, wanted: int) -> int:
    """On CUDA at least 20; on a CPU fewer than wanted, but at least five, of what takes long."""
    if device.type == "cuda":
        return max(wanted, _MIN_CUDA_REPEATS)
    return min(wanted, max(int(1e3 * _CPU_SECONDS / round_ms), _MIN_CPU_REPEATS))


def check_contenders(
    problem: Problem, *, backward: bool
) -> list[tuple[Contender, KernelTiming, Step | None]]:
    """Every contender with its error, and its step unless it cannot run or does not agree.

    Raises:
        ValueError: one of ours does not agree.
        RuntimeError: one of ours cannot run, though nothing forbids it.
    """
    truth = find_truth(problem, backward=backward)
    found: list[tuple[Contender, KernelTiming, Step | None]] = []
    for contender in problem.contenders:
        timing = KernelTiming(contender.name, contender.peer, note=contender.obstacle)
        step = None
        if not contender.obstacle:
            try:
                step = make_step(problem, contender, truth, backward=backward)
                timing.error = agreement(problem, contender, truth, step)
            except torch.OutOfMemoryError:
                step, timing.note = None, "out of memory"
                torch.cuda.empty_cache()
            except (RuntimeError, ValueError, TypeError, ImportError, OSError) as error:
                if not contender.peer:
                    error.add_note(f"{problem.name}: {contender.name}")
                    raise
                step, timing.note = None, str(error).strip().splitlines()[0][:160]
        found.append((contender, timing, step))
    return found


def _fill_rates(timings: list[KernelTiming], problem: Problem, backward: bool, copy: float) -> None:
    """Everything that follows from the times."""
    peers = [t.ms[0] for t in timings if t.peer and t.ms]
    for timing in timings:
        if timing.ms is None:
            continue
        ms = timing.ms[0]
        if peers:
            timing.ratio = min(peers) / ms
        if problem.cost.bytes is not None:
            timing.gb_s = sum(problem.cost.bytes[: 1 + backward]) / ms / 1e6
            timing.copy_share = timing.gb_s / copy
        if problem.cost.flops is not None:
            timing.tflop_s = sum(problem.cost.flops[: 1 + backward]) / ms / 1e9


def compare_kernels(
    benchmark: Callable, problem: Problem, *, backward: bool, copy: float, repeats: int
) -> KernelComparison:
    """Checks all contenders against float64, then times those that agree in turn.

    Args:
        benchmark: the fixture of pytest-benchmark, whose own table shows the first way that runs.
        problem: what to solve; backward: whether gradients are part of it.
        copy: GB/s of a copy on this device; repeats: of each way, on CUDA at least 20.
    """
    device = problem.leaves[0].device
    checked = check_contenders(problem, backward=backward)
    clocks, round_ms = [], 0.0
    for contender, timing, step in checked:
        if step is not None:
            # A graph's memory is set aside when it is recorded.
            timing.peak_mb = None if contender.replay else _peak_mb(step, device)
            timing.launches = _launches(step, device)
            clock, ms = _clock(step, device)
            clocks.append((timing, clock))
            round_ms += ms
    first = clocks[0][1]

    def others() -> None:
        for _, clock in clocks[1:]:
            clock()

    repeats = _repeats(round_ms, device, repeats)
    benchmark.pedantic(first, setup=others, rounds=repeats, iterations=1, warmup_rounds=0)
    for timing, clock in clocks:
        timing.ms, timing.host_ms = spread(clock.ms), statistics.median(clock.host_ms)
    timings = [timing for _, timing, _ in checked]
    _fill_rates(timings, problem, backward, copy)
    limits = {tolerances(problem, contender) for contender, _, _ in checked}
    about = problem.about | {
        "dtype": str(problem.dtype).removeprefix("torch."),
        "repeats": repeats,
        "copy": f"{copy:.1f} GB/s",
        "tolerance of results and gradients": " or ".join(
            f"{value:.0e} and {slope:.0e}" for value, slope in sorted(limits)
        ),
    }
    name = f"{problem.name}, {'forward + backward' if backward else 'forward'}"
    count = 1 + backward
    cost = problem.cost
    comparison = KernelComparison(
        name,
        about,
        timings,
        copy_gb_s=copy,
        bytes=None if cost.bytes is None else sum(cost.bytes[:count]),
        flops=None if cost.flops is None else sum(cost.flops[:count]),
    )
    benchmark.group = name
    benchmark.extra_info.update(asdict(comparison))
    return comparison
