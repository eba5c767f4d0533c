"""Interleaved timing of several ways to do one thing.

Other work on a machine slows whatever happens to run at that moment. So the ways take turns, repeat
by repeat, in one process, and the processor time of the process is kept beside the wall clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from bench.tables import Comparison, Rates, Timing
from dragkit.observe.flops import ActiveWeights, model_flops_utilisation
from dragkit.observe.gpu import DeviceSpec, GpuMonitor, device_spec

_REPEATS, _WARMUP, _LEAST = 9, 2, 3


@dataclass(slots=True)
class Tally:
    """Tokens that a way's steps have seen so far, counted by the steps themselves.

    Attributes:
        tokens, supervised: real ones, without padding.
        weights: of the language model in training; None where FLOPs are not counted.
    """

    tokens: int = 0
    supervised: int = 0
    weights: ActiveWeights | None = None


@dataclass(frozen=True, slots=True)
class Way:
    """One way to do the work.

    Attributes:
        name: as printed; step: does `questions` questions' worth of work.
        questions: of one call; calls: of one repeat, so that a repeat is long enough to be timed.
        tally: what its steps count, where they pass a language model.
    """

    name: str
    step: Callable[[], object]
    questions: int
    calls: int = 1
    tally: Tally | None = None


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), fifths[0], fifths[-1]


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class _Clock:
    """Runs one repeat of a way and keeps its times per call, in milliseconds.

    Args:
        way: to run; monitor: of the GPU that it runs on.
    """

    def __init__(self, way: Way, monitor: GpuMonitor | None = None) -> None:
        self.way = way
        self.monitor = monitor if way.tally is not None else None
        self.wall: list[float] = []
        self.cpu: list[float] = []
        # Tokens, supervised tokens and FLOPs per second.
        self.rates: list[tuple[float, float, float]] = []
        self.joules: float | None = 0.0

    def _energy(self) -> float | None:
        reading = None if self.monitor is None else self.monitor.read()
        return None if reading is None else reading.energy_j

    def __call__(self) -> None:
        tally = self.way.tally
        before = (0, 0) if tally is None else (tally.tokens, tally.supervised)
        energy = self._energy()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(self.way.calls):
            self.way.step()
        _synchronise()
        seconds = time.perf_counter() - wall
        self.wall.append(seconds * 1e3 / self.way.calls)
        self.cpu.append((time.process_time() - cpu) * 1e3 / self.way.calls)
        if tally is None:
            return
        tokens, supervised = tally.tokens - before[0], tally.supervised - before[1]
        flops = 0.0 if tally.weights is None else tally.weights.step_flops(tokens, supervised)
        self.rates.append((tokens / seconds, supervised / seconds, flops / seconds))
        after = self._energy()
        if self.joules is None or energy is None or after is None:
            self.joules = None
        else:
            self.joules += after - energy

    def medians(self, spec: DeviceSpec | None) -> Rates | None:
        """Rates over all repeats; None for a way that counts no tokens."""
        if not self.rates:
            return None
        tokens, supervised, flops = (statistics.median(x) for x in zip(*self.rates, strict=True))
        # The driver renews its counter a few times a second: only the sum over all repeats counts.
        questions = self.way.questions * self.way.calls * len(self.rates)
        return Rates(
            tokens_per_s=tokens,
            supervised_tokens_per_s=supervised or None,
            flop_per_s=flops or None,
            mfu=model_flops_utilisation(flops, spec) if flops else None,
            joules_per_question=None if self.joules is None else self.joules / questions,
        )


def _warm_up(way: Way, calls: int) -> float:
    """Seconds of the last of some calls, at least one."""
    seconds = 0.0
    for _ in range(max(calls, 1)):
        begin = time.perf_counter()
        way.step()
        _synchronise()
        seconds = time.perf_counter() - begin
    return seconds


def compare(
    benchmark: Callable,
    name: str,
    ways: Sequence[Way],
    about: dict[str, object],
    *,
    repeats: int = _REPEATS,
    warmup: int = _WARMUP,
    seconds: float | None = None,
    device: torch.device | None = None,
) -> Comparison:
    """Times the ways in turn; whether they agree is the caller's to have checked before.

    pytest-benchmark's own table shows the first way, whose opponents run in the untimed set-up of
    each of its rounds; the whole comparison goes into `extra_info`.

    Args:
        benchmark: the fixture of pytest-benchmark.
        name: of the comparison; about: sizes and settings, for the table.
        ways: ours first.
        repeats: of each way; warmup: calls of each before, at least one.
        seconds: takes fewer repeats, but at least three, of what would last longer.
        device: that the ways run on; a GPU's energy and peak rate are looked up.

    Returns:
        The timings, in the order of `ways`.

    Raises:
        ValueError: fewer than two repeats, which have no spread.
    """
    if repeats < 2:
        raise ValueError(f"compare: at least 2 repeats are needed, got {repeats}")
    round_s = sum(way.calls * _warm_up(way, warmup) for way in ways)
    if seconds is not None and round_s > 0:
        repeats = min(repeats, max(_LEAST, int(seconds / round_s)))
    on_gpu = device is not None and device.type == "cuda"
    monitor = GpuMonitor.open(device) if on_gpu else None
    spec = device_spec(torch.cuda.get_device_name(device)) if on_gpu else None
    clocks = [_Clock(way, monitor) for way in ways]

    def opponents() -> None:
        for clock in clocks[1:]:
            clock()

    benchmark.pedantic(clocks[0], setup=opponents, rounds=repeats, iterations=1)
    ours_wall = statistics.median(clocks[0].wall) / ways[0].questions
    ours_cpu = statistics.median(clocks[0].cpu) / ways[0].questions
    comparison = Comparison(name, about | {"repeats": repeats})
    for way, clock in zip(ways, clocks, strict=True):
        wall, cpu = spread(clock.wall), spread(clock.cpu)
        comparison.timings.append(
            Timing(
                name=way.name,
                questions_per_s=1e3 * way.questions / wall[0],
                wall_ms=wall,
                cpu_ms=cpu,
                questions_per_cpu_s=1e3 * way.questions / cpu[0],
                speedup_wall=wall[0] / way.questions / ours_wall,
                speedup_cpu=cpu[0] / way.questions / ours_cpu,
                rates=clock.medians(spec),
            )
        )
    benchmark.group = name
    benchmark.extra_info.update(asdict(comparison))
    return comparison


def check_agreement(name: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """The gate in front of a timing: a fast wrong answer is not a result.

    Raises:
        ValueError: the largest difference exceeds `tolerance` times the largest value.
    """
    ours, theirs = ours.detach(), theirs.detach()
    scale = float(theirs.abs().max().clamp(min=1e-12))
    error = float((ours - theirs).abs().max()) / scale
    if not error <= tolerance:
        raise ValueError(f"{name}: differs from ours by {error:.1e} of its scale; not timed")
