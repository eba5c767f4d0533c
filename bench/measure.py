"""One way to time contenders: pytest-benchmark on a CPU, `triton.testing.do_bench` on a GPU.

Other work on a machine slows what runs at that moment. So on a CPU the contenders take turns,
round by round, in one process, and the processor time of the process is kept beside the wall time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.results import Comparison, Rates, Spread, Timing
from dragkit.observe.flops import ActiveWeights, model_flops_utilisation
from dragkit.observe.gpu import GpuMonitor, card_spec

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# A round of a contender lasts at least this long on a CPU, and at most this many calls.
_ROUND_MS, _MOST_CALLS = 4.0, 500
_LEAST_ROUNDS = 3
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}
_LAUNCH = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")


@dataclass(slots=True)
class Tally:
    """Tokens that a contender's calls have processed, counted by the calls themselves.

    Attributes:
        tokens, supervised: real ones, without padding.
        weights: of the language model in training; None where FLOPs are not counted.
    """

    tokens: int = 0
    supervised: int = 0
    weights: ActiveWeights | None = None


@dataclass(slots=True)
class Contender:
    """One implementation of what a comparison times.

    Attributes:
        name: as printed; run: one call.
        peer: written with other libraries; otherwise ours.
        calls: of one round on a CPU; None for as many as last long enough to be timed.
        tally: what the calls count, where they pass a language model.
        replay: to be recorded as a CUDA graph.
        obstacle: why it cannot run here. It is then named in the table and not run.
        error: its largest difference from float64, if that was checked.
    """

    name: str
    run: Callable[[], object]
    peer: bool = True
    calls: int | None = 1
    tally: Tally | None = None
    replay: bool = False
    obstacle: str = ""
    error: float | None = None


def check_agreement(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """The gate before a timing: a fast wrong answer is not a result.

    Raises:
        ValueError: the largest difference exceeds `tolerance` times the largest value.
    """
    ours, theirs = ours.detach(), theirs.detach()
    scale = float(theirs.abs().max().clamp(min=1e-12))
    error = float((ours - theirs).abs().max()) / scale
    if not error <= tolerance:
        raise ValueError(f"{name}: differs from ours by {error:.1e} of its scale; not timed")


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(values: Sequence[float]) -> Spread:
    """Median, 20th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), fifths[0], fifths[-1]


class _Timed:
    """A contender being timed.

    Attributes:
        calls: of one round; count: calls since the warm-up; joules: of one call.
        wall_ms, cpu_ms: of one call, round by round.
    """

    def __init__(self, contender: Contender, warmup: int) -> None:
        self.contender = contender
        for _ in range(max(warmup, 1)):
            begin = time.perf_counter()
            contender.run()
            _synchronise()
            self.last_ms = (time.perf_counter() - begin) * 1e3
        least = math.ceil(_ROUND_MS / max(self.last_ms, 1e-6))
        self.calls = contender.calls or min(_MOST_CALLS, least)
        tally = contender.tally
        self.before = None if tally is None else (tally.tokens, tally.supervised)
        self.count = 0
        self.joules: float | None = None
        self.wall_ms: list[float] = []
        self.cpu_ms: list[float] = []

    def call(self) -> None:
        """One call, counted."""
        self.count += 1
        self.contender.run()

    def round(self) -> None:
        """One round on a CPU."""
        wall, used = time.perf_counter(), time.process_time()
        for _ in range(self.calls):
            self.call()
        self.wall_ms.append((time.perf_counter() - wall) * 1e3 / self.calls)
        self.cpu_ms.append((time.process_time() - used) * 1e3 / self.calls)

    def on_gpu(self, repeats: int, monitor: GpuMonitor | None) -> Spread:
        """Device time of a call with a cold L2 cache, and the board's energy beside it."""
        from triton.testing import do_bench

        before, count = _joules(monitor), self.count
        rep = max(100, math.ceil(repeats * self.last_ms))
        median, low, high = do_bench(self.call, rep=rep, quantiles=[0.5, 0.2, 0.8])
        after = _joules(monitor)
        if before is not None and after is not None:
            self.joules = (after - before) / (self.count - count)
        return median, low, high

    def rates(self, ms: float, questions: int | None, gpu: str | None) -> Rates | None:
        """Tokens of all timed calls over their median time; None where no tokens are counted."""
        tally = self.contender.tally
        if tally is None:
            return None
        seconds = self.count * ms / 1e3
        tokens, supervised = tally.tokens - self.before[0], tally.supervised - self.before[1]
        flops = tally.weights.step_flops(tokens, supervised) if tally.weights else 0.0
        rate, spec = flops / seconds, None if gpu is None else card_spec(gpu)
        return Rates(
            tokens_per_s=tokens / seconds,
            supervised_tokens_per_s=supervised / seconds or None,
            flop_per_s=rate or None,
            mfu=model_flops_utilisation(rate, spec) if rate else None,
            joules_per_question=None if self.joules is None else self.joules / questions,
        )


def _joules(monitor: GpuMonitor | None) -> float | None:
    reading = None if monitor is None else monitor.read()
    return None if reading is None else reading.energy_j


def _launches(run: Callable[[], object], device: torch.device) -> int | None:
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        run()
        _synchronise()
    events = profiler.events() or ()
    if cuda:
        return sum(event.name.startswith(_LAUNCH) for event in events) or None
    return sum(event.name.startswith("aten::") and not event.cpu_children for event in events)


def _peak_mb(run: Callable[[], object]) -> float:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large copy, bytes read and written, the median of nine."""
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timed = _Timed(Contender("copy", lambda: target.copy_(source)), warmup=2)
    if device.type == "cuda":
        ms = timed.on_gpu(9, None)[0]
    else:
        for _ in range(9):
            timed.round()
        ms = statistics.median(timed.wall_ms)
    return 2 * source.nbytes / ms / 1e6


def compare(
    benchmark: Callable,
    comparison: Comparison,
    contenders: Sequence[Contender],
    *,
    repeats: int = 9,
    warmup: int = 2,
    seconds: float | None = None,
    device: torch.device = CPU,
) -> Comparison:
    """Times contenders. Whether they agree is the caller's to check before.

    pytest-benchmark's own table shows the first one. On a CPU the others run in the untimed set-up
    of each of its rounds. The whole comparison goes into `extra_info`.

    Args:
        benchmark: the fixture of pytest-benchmark.
        comparison: name, settings and counts; it gets the timings, in the order of `contenders`.
        contenders: ours first.
        repeats: rounds of each; warmup: calls of each before, at least one.
        seconds: lowers the repeats, to no less than three, where they would last longer.
        device: that they run on. A GPU's energy and peak rate are looked up.

    Raises:
        ValueError: fewer than two repeats, which have no spread.
    """
    if repeats < 2:
        raise ValueError(f"compare: at least 2 repeats are needed, got {repeats}")
    timed = {c.name: _Timed(c, warmup) for c in contenders if not c.obstacle}
    round_ms = sum(t.calls * t.last_ms for t in timed.values())
    if seconds is not None and round_ms > 0:
        repeats = min(repeats, max(_LEAST_ROUNDS, int(1e3 * seconds / round_ms)))
    first, *others = timed.values()
    gpu, monitor = None, None
    if device.type == "cuda":
        gpu, monitor = torch.cuda.get_device_name(device), GpuMonitor.open(device)
        spreads = {name: t.on_gpu(repeats, monitor) for name, t in timed.items()}
        benchmark.pedantic(first.call, setup=_synchronise, rounds=repeats, iterations=1)
    else:

        def opponents() -> None:
            for other in others:
                other.round()

        benchmark.pedantic(first.round, setup=opponents, rounds=repeats, iterations=1)
        spreads = {name: spread(t.wall_ms) for name, t in timed.items()}
    for contender in contenders:
        row = Timing(contender.name, contender.peer, error=contender.error, note=contender.obstacle)
        comparison.timings.append(row)
        if (found := timed.get(contender.name)) is None:
            continue
        row.ms = spreads[contender.name]
        row.cpu_ms = statistics.median(found.cpu_ms) if found.cpu_ms else None
        row.rates = found.rates(row.ms[0], comparison.questions, gpu)
        if comparison.bytes is not None:
            row.launches = _launches(contender.run, device)
            # A CUDA graph's memory is set aside when it is recorded.
            counted = device.type == "cuda" and not contender.replay
            row.peak_mb = _peak_mb(contender.run) if counted else None
    comparison.about["repeats"] = repeats
    benchmark.group = comparison.name
    benchmark.extra_info.update(msgspec.to_builtins(comparison))
    return comparison
