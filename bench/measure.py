"""Timing of contenders: pytest-benchmark on a CPU, `triton.testing.do_bench` on a GPU.

On a CPU the contenders take turns in one process, so that other work on the machine slows all of
them. The processor time of the process is recorded beside the wall time.
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
# On a CPU a round of a contender lasts at least this long, unless it reaches the number of calls.
_ROUND_MS, _MAX_CALLS = 4.0, 500
_MIN_REPEATS = 3
# Larger than any cache, so that the copy measures memory.
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}
# Beginnings of the names of CUDA calls that start work on the device.
_LAUNCH = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")


@dataclass(slots=True)
class Tally:
    """Tokens that a contender has processed. Its calls count them.

    Attributes:
        tokens, supervised: tokens without padding.
        weights: of the language model in training. None where FLOPs are not counted.
    """

    tokens: int = 0
    supervised: int = 0
    weights: ActiveWeights | None = None


@dataclass(slots=True)
class Contender:
    """One implementation that a comparison times.

    Attributes:
        name: as printed.
        run: makes one call.
        peer: whether it is written with other libraries.
        calls: calls of one round on a CPU. None chooses a number that lasts long enough.
        tally: the tokens that the calls count, if they run a language model.
        replay: whether it is recorded as a CUDA graph.
        obstacle: why it cannot run here. The table then names it, and it is not run.
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


def check_agreement(
    name: str, ours: Tensor, theirs: Tensor, tolerance: float, *, order: float = math.inf
) -> None:
    """The gate before a timing, so that no wrong answer is timed.

    Args:
        tolerance: largest norm of the difference over the norm of `theirs`.
        order: of the norms. 2 allows that rounding puts single elements on the other side of a
            ReLU, or single tokens with another expert.

    Raises:
        ValueError: the difference exceeds the tolerance.
    """
    ours, theirs = ours.detach().double(), theirs.detach().double()
    # A scale of 0 would make the error of equal zeros NaN.
    scale = torch.linalg.vector_norm(theirs, order).clamp(min=1e-12)
    error = float(torch.linalg.vector_norm(ours - theirs, order) / scale)
    # The negation also refuses NaN.
    if not error <= tolerance:
        raise ValueError(f"{name}: differs from ours by {error:.1e} of its norm; not timed")


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(values: Sequence[float]) -> Spread:
    """Median, 20th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), fifths[0], fifths[-1]


class _Timed:
    """A contender during its timing. The constructor warms it up.

    Attributes:
        calls: calls of one round.
        count: calls since the warm-up.
        joules: energy of one call.
        wall_ms, cpu_ms: of one call, for each round.
    """

    def __init__(self, contender: Contender, warmup: int) -> None:
        self.contender = contender
        for _ in range(max(warmup, 1)):
            begin = time.perf_counter()
            contender.run()
            _synchronise()
            # The last call is the estimate, because the first one allocates and compiles.
            self.last_ms = (time.perf_counter() - begin) * 1e3
        calls = math.ceil(_ROUND_MS / max(self.last_ms, 1e-6))
        self.calls = contender.calls or min(_MAX_CALLS, calls)
        tally = contender.tally
        self.before = None if tally is None else (tally.tokens, tally.supervised)
        self.count = 0
        self.joules: float | None = None
        self.wall_ms: list[float] = []
        self.cpu_ms: list[float] = []

    def call(self) -> None:
        """Makes and counts one call."""
        self.count += 1
        self.contender.run()

    def round(self) -> None:
        """Times one round on a CPU."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(self.calls):
            self.call()
        self.wall_ms.append((time.perf_counter() - wall) * 1e3 / self.calls)
        self.cpu_ms.append((time.process_time() - cpu) * 1e3 / self.calls)

    def on_gpu(self, repeats: int, monitor: GpuMonitor | None) -> Spread:
        """Device time of a call with a cold L2 cache. Records the board's energy as well."""
        from triton.testing import do_bench

        before, count = _joules(monitor), self.count
        # The duration in ms, which do_bench divides by its own estimate of a call.
        rep = max(100, math.ceil(repeats * self.last_ms))
        median, low, high = do_bench(self.call, rep=rep, quantiles=[0.5, 0.2, 0.8])
        after = _joules(monitor)
        if before is not None and after is not None:
            # do_bench also makes calls that it does not time. `count` and the energy include them.
            self.joules = (after - before) / (self.count - count)
        return median, low, high

    def rates(self, ms: float, questions: int | None, gpu: str | None) -> Rates | None:
        """Tokens of all timed calls over their median time. None if no tokens are counted."""
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
    # Only the innermost operators loop over elements.
    return sum(event.name.startswith("aten::") and not event.cpu_children for event in events)


def _peak_mb(run: Callable[[], object]) -> float:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large copy, with the bytes read and written, as the median of nine."""
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
) -> None:
    """Times contenders that the caller has checked.

    pytest-benchmark's own table shows the first one. On a CPU the others run in the untimed set-up
    of each of its rounds. The whole comparison goes into `extra_info`.

    Args:
        benchmark: the fixture of pytest-benchmark.
        comparison: name, settings and counts. Gets the timings in the order of `contenders`.
        contenders: ours first.
        repeats: rounds of each contender.
        warmup: calls of each contender before its rounds, at least one.
        seconds: lowers `repeats` to what takes this long, but not below three.
        device: device of the contenders. A GPU's energy and peak rate are read.

    Raises:
        ValueError: fewer than two repeats, which have no percentiles.
    """
    if repeats < 2:
        raise ValueError(f"compare: repeats is {repeats}, at least 2 are needed for percentiles")
    timed = {c.name: _Timed(c, warmup) for c in contenders if not c.obstacle}
    round_ms = sum(t.calls * t.last_ms for t in timed.values())
    if seconds is not None and round_ms > 0:
        repeats = min(repeats, max(_MIN_REPEATS, int(1e3 * seconds / round_ms)))
    first, *others = timed.values()
    gpu = None
    if device.type == "cuda":
        gpu, monitor = torch.cuda.get_device_name(device), GpuMonitor.open(device)
        spreads = {name: t.on_gpu(repeats, monitor) for name, t in timed.items()}
        # pytest-benchmark shows host time here. The comparison has the device times of do_bench.
        benchmark.pedantic(first.call, setup=_synchronise, rounds=repeats, iterations=1)
    else:

        def other_rounds() -> None:
            for other in others:
                other.round()

        benchmark.pedantic(first.round, setup=other_rounds, rounds=repeats, iterations=1)
        spreads = {name: spread(t.wall_ms) for name, t in timed.items()}
    for contender in contenders:
        row = Timing(contender.name, contender.peer, error=contender.error, note=contender.obstacle)
        comparison.timings.append(row)
        if contender.obstacle:
            continue
        measured = timed[contender.name]
        row.ms = spreads[contender.name]
        row.cpu_ms = statistics.median(measured.cpu_ms) if measured.cpu_ms else None
        row.rates = measured.rates(row.ms[0], comparison.questions, gpu)
        if comparison.bytes is not None:
            row.launches = _launches(contender.run, device)
            # A CUDA graph allocates its memory when it is recorded.
            allocates = device.type == "cuda" and not contender.replay
            row.peak_mb = _peak_mb(contender.run) if allocates else None
    comparison.about["repeats"] = repeats
    benchmark.group = comparison.name
    benchmark.extra_info.update(msgspec.to_builtins(comparison))
