"""Two runs on one device, row by row: which of our rows became slower, which are in one only."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.reading import Results
from bench.tables import KernelComparison, KernelTiming, Timing

_KEPT = ("threads", "cpu_capability", "python")


@dataclass(frozen=True, slots=True)
class Row:
    """One timed way.

    Attributes:
        ours: written by us, so that its slowing down is a regression.
        ms: median; None if it did not run.
    """

    ours: bool
    ms: float | None


@dataclass(slots=True)
class Verdict:
    """The outcome of a comparison.

    Attributes:
        lines: to be printed; regressions: our rows that are slower than allowed.
    """

    lines: list[str] = field(default_factory=list)
    regressions: list[str] = field(default_factory=list)


class DifferentDevices(Exception):
    """The runs cannot be compared."""


def _milliseconds(timing: Timing | KernelTiming) -> float | None:
    spread = timing.wall_ms if isinstance(timing, Timing) else timing.ms
    return None if spread is None else spread[0]


def rows(results: Sequence[Results]) -> dict[str, Row]:
    """Every way of every comparison under a name; what occurs again is numbered."""
    found: dict[str, Row] = {}
    seen: Counter[str] = Counter()
    for result in results:
        for comparison in result.comparisons:
            dtype = comparison.about.get("dtype")
            place = f"{result.theme}: {comparison.name}{f', {dtype}' if dtype else ''}"
            for number, timing in enumerate(comparison.timings):
                name = f"{place}: {timing.name}"
                seen[name] += 1
                if seen[name] > 1:
                    name += f" (no. {seen[name]})"
                if isinstance(comparison, KernelComparison):
                    ours = not timing.peer
                else:
                    ours = number == 0 or timing.name.startswith("dragkit")
                found[name] = Row(ours, _milliseconds(timing))
    return found


def _device(results: Sequence[Results], label: str) -> str:
    devices = sorted({str(result.machine["device"]) for result in results})
    if len(devices) != 1:
        raise DifferentDevices(f"{label} holds runs of {len(devices)} devices: {devices}")
    return devices[0]


def _changes(first: Sequence[Results], second: Sequence[Results]) -> list[str]:
    """What else differs between two runs of one device, and may be the reason."""
    lines = []
    one, other = first[0].machine, second[0].machine
    pairs = [(key, one.get(key), other.get(key)) for key in _KEPT]
    found = (machine.get("packages") for machine in (one, other))
    packages = [versions if isinstance(versions, dict) else {} for versions in found]
    for name in sorted({*packages[0], *packages[1]}):
        pairs.append((name, packages[0].get(name), packages[1].get(name)))
    for key, a, b in pairs:
        if a != b and a is not None and b is not None:
            lines.append(f"note: {key} differs: {a} and {b}")
    return lines


def compare_runs(
    first: Sequence[Results], second: Sequence[Results], *, threshold: float
) -> Verdict:
    """Ratios of the second run's medians to the first's.

    Args:
        first, second: all files of a run, at least one each.
        threshold: 0.1 lets a row take up to 1.1 times as long. Opponents are listed, and judged
            never: they tell whether the machine was as fast.

    Raises:
        DifferentDevices: the runs are not of one device.
    """
    devices = _device(first, "the first"), _device(second, "the second")
    if devices[0] != devices[1]:
        raise DifferentDevices(
            f"{devices[0]} and {devices[1]} are different devices: a ratio of their times says "
            "nothing about the code"
        )
    a, b = rows(first), rows(second)
    found = Verdict([f"device {devices[0]}", *_changes(first, second), ""])
    found.lines += ["| row | first ms | second ms | second / first | |", "|---|---:|---:|---:|---|"]
    opponents = []
    for name in (name for name in a if name in b):
        before, after, ours = a[name].ms, b[name].ms, a[name].ours
        if before is None or after is None:
            continue
        ratio = after / before if before else math.inf
        word = "" if ours else "opponent"
        if not ours:
            opponents.append(ratio)
        elif ratio > 1 + threshold:
            word = "SLOWER"
            found.regressions.append(name)
        elif ratio < 1 / (1 + threshold):
            word = "faster"
        found.lines.append(f"| {name} | {before:.4g} | {after:.4g} | {ratio:.3f} | {word} |")
    found.lines += _absent(a, b)
    if opponents:
        middle = statistics.median(opponents)
        found.lines += ["", f"opponents: median ratio {middle:.3f} of {len(opponents)} rows"]
    slower = len(found.regressions)
    found.lines.append(f"{slower} of our rows slower by more than {threshold:.0%}")
    return found


def _absent(a: dict[str, Row], b: dict[str, Row]) -> list[str]:
    """Rows that only one run has, or only one has timed."""
    lines = []
    for label, one, other in (("first", a, b), ("second", b, a)):
        for name, row in one.items():
            if name not in other:
                lines.append(f"- only in the {label}: {name}")
            elif row.ms is not None and other[name].ms is None:
                lines.append(f"- timed only in the {label}: {name}")
    return ["", *lines] if lines else []
