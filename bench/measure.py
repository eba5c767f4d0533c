"""Interleaved timing of several ways to do one thing, and the tables it is written into.

Other work on a machine slows whatever happens to run at that moment. So the ways take turns, repeat
by repeat, in one process, and the processor time of the process is kept beside the wall clock.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar, Protocol

import torch

_PACKAGES = ("torch", "torch_geometric", "transformers", "peft", "numpy")
_REPEATS, _WARMUP = 9, 2


class Reported(Protocol):
    """A dataclass that goes into the result files."""

    __dataclass_fields__: ClassVar[dict]

    def markdown(self) -> str:
        """Its part of the Markdown file."""
        ...


@dataclass(frozen=True, slots=True)
class Way:
    """One way to do the work.

    Attributes:
        name: as printed; step: does `questions` questions' worth of work.
        questions: of one call; calls: of one repeat, so that a repeat is long enough to be timed.
    """

    name: str
    step: Callable[[], object]
    questions: int
    calls: int = 1


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one call: median, 20th and 80th percentile of wall and processor time."""

    name: str
    questions_per_s: float
    wall_ms: tuple[float, float, float]
    cpu_ms: tuple[float, float, float]
    questions_per_cpu_s: float
    speedup_wall: float
    speedup_cpu: float


@dataclass(slots=True)
class Comparison:
    """The timings of one comparison; the first way is ours, and speedups are of ours over each."""

    name: str
    about: dict[str, object]
    timings: list[Timing] = field(default_factory=list)

    def markdown(self) -> str:
        """A table with one line for each way."""
        # A speedup is how many times faster the first way is than this line's.
        about = ", ".join(f"{key} {value}" for key, value in self.about.items())
        lines = [
            f"### {self.name}",
            "",
            about,
            "",
            "| way | questions/s | wall ms (p20-p80) | CPU ms (p20-p80) | speedup, wall | CPU |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for row in self.timings:
            (w, w20, w80), (c, c20, c80) = row.wall_ms, row.cpu_ms
            lines.append(
                f"| {row.name} | {row.questions_per_s:.1f} | {w:.1f} ({w20:.1f}-{w80:.1f}) | "
                f"{c:.1f} ({c20:.1f}-{c80:.1f}) | {row.speedup_wall:.2f} | {row.speedup_cpu:.2f} |"
            )
        return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), fifths[0], fifths[-1]


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class _Clock:
    """Runs one repeat of a way and keeps its times per call, in milliseconds."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __call__(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(self.way.calls):
            self.way.step()
        _synchronise()
        self.wall.append((time.perf_counter() - wall) * 1e3 / self.way.calls)
        self.cpu.append((time.process_time() - cpu) * 1e3 / self.way.calls)


def compare(
    benchmark: Callable,
    name: str,
    ways: Sequence[Way],
    about: dict[str, object],
    *,
    repeats: int = _REPEATS,
) -> Comparison:
    """Times the ways in turn; whether they agree is the caller's to have checked before.

    pytest-benchmark's own table shows the first way, whose opponents run in the untimed set-up of
    each of its rounds; the whole comparison goes into `extra_info`.

    Args:
        benchmark: the fixture of pytest-benchmark.
        name: of the comparison; about: sizes and settings, for the table.
        ways: ours first.
        repeats: of each way.

    Returns:
        The timings, in the order of `ways`.

    Raises:
        ValueError: fewer than two repeats, which have no spread.
    """
    if repeats < 2:
        raise ValueError(f"compare: at least 2 repeats are needed, got {repeats}")
    for way in ways:
        for _ in range(_WARMUP):
            way.step()
    clocks = [_Clock(way) for way in ways]

    def opponents() -> None:
        for clock in clocks[1:]:
            clock()

    benchmark.pedantic(clocks[0], setup=opponents, rounds=repeats, iterations=1)
    ours_wall = statistics.median(clocks[0].wall) / ways[0].questions
    ours_cpu = statistics.median(clocks[0].cpu) / ways[0].questions
    comparison = Comparison(name, about)
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


def device_name() -> str:
    """The GPU, or the processor where there is none, as a folder name."""
    name = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2]
                break
    return "-".join(name.lower().replace("(", " ").replace(")", " ").split())


def _commit() -> str | None:
    """The commit of the working tree, with a plus sign where it has changes."""
    here = Path(__file__).parent
    try:
        head = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=10"]
        return subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def machine_info() -> dict[str, object]:
    """What a figure depends on besides the code."""
    packages = {}
    for package in _PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    return {
        "device": device_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": packages,
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
    }


def write_results(folder: Path, theme: str, comparisons: Sequence[Reported]) -> Path:
    """Writes `<folder>/<device>/<theme>.json` and the same as a Markdown table.

    Args:
        folder: such as bench/results; theme: file name; comparisons: of one session.

    Returns:
        The path of the JSON file.
    """
    info = machine_info()
    target = folder / str(info["device"])
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"{theme}.json"
    content = {"machine": info, "comparisons": [asdict(c) for c in comparisons]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    packages = ", ".join(f"{k} {v}" for k, v in info["packages"].items())  # type: ignore[union-attr]
    head = (
        f"# {theme}\n\n{info['device']} ({info['cpu_capability']}), {info['threads']} threads, "
        f"Python {info['python']}, {packages}, {info['date']}, commit {info['commit']}\n"
    )
    text = head + "".join("\n" + c.markdown() for c in comparisons)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return path
