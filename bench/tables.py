"""What the result files hold, and the Markdown tables made of it; standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

Spread = tuple[float, float, float]


class Reported(Protocol):
    """A dataclass that goes into the result files."""

    __dataclass_fields__: ClassVar[dict]

    def markdown(self, head: str = "") -> str:
        """Its part of the Markdown file; `head` goes above the table."""
        ...


def cell(value: float | None, form: str) -> str:
    """A number in a table; empty for None."""
    return "" if value is None else format(value, form)


def describe(machine: Mapping[str, object]) -> str:
    """Device, versions, date, commit and command in one line; unknown ones are left out."""
    parts = [str(machine.get("device", "device not recorded"))]
    if capability := machine.get("cpu_capability"):
        parts[0] += f" ({capability})"
    if threads := machine.get("threads"):
        parts.append(f"{threads} threads" if threads != 1 else "1 thread")
    if python := machine.get("python"):
        parts.append(f"Python {python}")
    packages = machine.get("packages")
    if isinstance(packages, Mapping):
        parts += [f"{name} {found}" for name, found in packages.items() if found]
    if date := machine.get("date"):
        parts.append(str(date))
    if commit := machine.get("commit"):
        parts.append(f"commit {commit}")
    if command := machine.get("command"):
        parts.append(f"`{command}`")
    return ", ".join(parts)


def _opening(name: str, head: str, about: Mapping[str, object]) -> list[str]:
    sizes = ", ".join(f"{key} {value}" for key, value in about.items())
    return [f"### {name}", "", *([head, ""] if head else []), *([sizes, ""] if sizes else [])]


@dataclass(frozen=True, slots=True)
class Rates:
    """What a way with a language model processes each second.

    Attributes:
        tokens_per_s, supervised_tokens_per_s: real tokens, without padding.
        flop_per_s: model FLOPs; mfu: their share of the device's dense bfloat16 rate.
        joules_per_question: by the GPU's own counter, the whole board's.
    """

    tokens_per_s: float
    supervised_tokens_per_s: float | None = None
    flop_per_s: float | None = None
    mfu: float | None = None
    joules_per_question: float | None = None


_RATE_COLUMNS = {
    "tokens_per_s": ("tokens/s", ".0f", 1.0),
    "supervised_tokens_per_s": ("supervised tokens/s", ".0f", 1.0),
    "flop_per_s": ("model GFLOP/s", ".4g", 1e-9),
    "mfu": ("MFU", ".3g", 1.0),
    "joules_per_question": ("J/question", ".3g", 1.0),
}


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one call: median, 20th and 80th percentile of wall and processor time."""

    name: str
    questions_per_s: float
    wall_ms: Spread
    cpu_ms: Spread
    questions_per_cpu_s: float
    speedup_wall: float
    speedup_cpu: float
    rates: Rates | None = None


@dataclass(slots=True)
class Comparison:
    """The timings of one comparison; the first way is ours, and speedups are of ours over each."""

    name: str
    about: dict[str, object]
    timings: list[Timing] = field(default_factory=list)

    def markdown(self, head: str = "") -> str:
        """A table with one line for each way, and one of tokens where there are any."""
        # A speedup is how many times faster the first way is than this line's.
        lines = [
            *_opening(self.name, head, self.about),
            "| way | questions/s | wall ms (p20-p80) | CPU ms (p20-p80) | speedup, wall | CPU |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for row in self.timings:
            (w, w20, w80), (c, c20, c80) = row.wall_ms, row.cpu_ms
            lines.append(
                f"| {row.name} | {row.questions_per_s:.1f} | {w:.1f} ({w20:.1f}-{w80:.1f}) | "
                f"{c:.1f} ({c20:.1f}-{c80:.1f}) | {row.speedup_wall:.2f} | {row.speedup_cpu:.2f} |"
            )
        return "\n".join([*lines, *self._rate_lines()]) + "\n"

    def _rate_lines(self) -> list[str]:
        rows = [(row.name, row.rates) for row in self.timings if row.rates is not None]
        used = [key for key in _RATE_COLUMNS if any(getattr(r, key) is not None for _, r in rows)]
        if not used:
            return []
        titles = " | ".join(_RATE_COLUMNS[key][0] for key in used)
        lines = ["", f"| way | {titles} |", f"|---|{'---:|' * len(used)}"]
        for name, rates in rows:
            cells = []
            for key in used:
                value, (_, form, scale) = getattr(rates, key), _RATE_COLUMNS[key]
                cells.append(cell(None if value is None else value * scale, form))
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return lines


@dataclass(slots=True)
class KernelTiming:
    """One contender: milliseconds of a call as median, 20th and 80th percentile.

    Attributes:
        ms: on CUDA the device's time between two events with a cold L2 cache, else wall time.
        host_ms: on CUDA the wall time of a call that is waited for, with a warm cache; on a CPU the
            processor time of all threads.
        ratio: time of the strongest peer over this one's.
        gb_s: least bytes over time; copy_share: of the bandwidth of a copy; tflop_s: of the least
            operations, whatever the contender computes.
        peak_mb: above what was allocated before, CUDA only.
        launches: on CUDA calls of the runtime that start work, else PyTorch operators without
            others inside.
        error: largest norm of a difference from float64 over the norm of that.
        note: why there are no times.
    """

    name: str
    peer: bool
    ms: Spread | None = None
    host_ms: float | None = None
    ratio: float | None = None
    gb_s: float | None = None
    copy_share: float | None = None
    tflop_s: float | None = None
    peak_mb: float | None = None
    launches: int | None = None
    error: float | None = None
    note: str = ""


@dataclass(slots=True)
class KernelComparison:
    """The timings of one problem, ours first.

    Attributes:
        copy_gb_s: GB/s of a copy in the same run.
        bytes, flops: least of a call, backward included if it was timed; None if not counted.
    """

    name: str
    about: dict[str, object]
    timings: list[KernelTiming] = field(default_factory=list)
    copy_gb_s: float | None = None
    bytes: float | None = None
    flops: float | None = None

    def markdown(self, head: str = "") -> str:
        """A table with one line for each contender that ran, and what did not run below."""
        lines = [
            *_opening(self.name, head, self.about),
            "| way | ms (p20-p80) | host ms | strongest peer / this | GB/s | of copy | TFLOP/s "
            "| peak MB | launches | error |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for row in self.timings:
            if row.ms is None:
                continue
            ms, low, high = row.ms
            cells = [
                row.name,
                f"{ms:.3f} ({low:.3f}-{high:.3f})",
                cell(row.host_ms, ".3f"),
                cell(row.ratio, ".2f"),
                cell(row.gb_s, ".3g"),
                cell(row.copy_share, ".2g"),
                cell(row.tflop_s, ".3g"),
                cell(row.peak_mb, ".1f"),
                cell(row.launches, "d"),
                cell(row.error, ".0e"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        absent = [f"- {row.name}: {row.note}" for row in self.timings if row.ms is None]
        if absent:
            lines += ["", "Not timed:", "", *absent]
        return "\n".join(lines) + "\n"
