"""Pictures of result files: roofline, throughput by size of the graphs, and a step's parts."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bench.reading import Profile, Results
from bench.tables import Comparison, KernelComparison, describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vP*Xhd<>"
# A trace's ranges are drawn in the order of a step.
_PARTS = ("copy", "replay", "retriever", "sampler", "prompt", "generator", "backward", "optimizer")
_GRAPHS = re.compile(r"\d+-fact graphs, ")


def _figure(
    title: str, machine: Mapping[str, object], panels: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure without a window, its title and the machine above."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.2 * panels + 1.2), layout="constrained")
    said = {key: value for key, value in machine.items() if key not in ("command", "packages")}
    figure.suptitle(f"{title}\n{describe(said)}", fontsize=9)
    axes = figure.subplots(panels, 1, squeeze=False)
    return figure, list(axes[:, 0])


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    return path


def roofline(result: Results) -> tuple[Path | None, list[str]]:
    """Every kernel row at its operations per byte and operations per second.

    The slope is the bandwidth of a copy in the same run; on a known GPU the flat lines are the peak
    rates of its data sheet.

    Returns:
        The picture, None without any row, and the names of comparisons that are not on it.
    """
    from dragkit.observe.gpu import device_spec

    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    copies, absent = [], []
    for comparison in result.comparisons:
        if not isinstance(comparison, KernelComparison):
            continue
        dtype = comparison.about.get("dtype")
        if not comparison.bytes or not comparison.flops or not comparison.copy_gb_s:
            absent.append(f"{comparison.name}, {dtype}")
            continue
        copies.append(comparison.copy_gb_s)
        for row in comparison.timings:
            if row.ms is not None:
                label = "opponents" if row.peer else f"{row.name}, {dtype}"
                rate = comparison.flops / row.ms[0] / 1e6
                points[label].append((comparison.flops / comparison.bytes, rate))
    if not points:
        return None, absent
    figure, (axes,) = _figure(f"{result.theme}: roofline", result.machine)
    intensity = [x for row in points.values() for x, _ in row]
    left, right = min(intensity) / 2, max(intensity) * 2
    copy = max(copies)
    axes.plot([left, right], [copy * left, copy * right], "k-", lw=1, label=f"copy {copy:.4g} GB/s")
    gpu = result.machine.get("gpu")
    spec = device_spec(gpu) if isinstance(gpu, str) else None
    if spec is not None:
        for name, peak in (("bfloat16", spec.bf16_tflops), ("float32", spec.fp32_tflops)):
            axes.axhline(peak * 1e3, ls="--", lw=1, color="0.4")
            axes.text(left, peak * 1e3, f"{name}, data sheet", fontsize=7, va="bottom")
    for place, (label, row) in enumerate(sorted(points.items())):
        style = {"color": "0.6", "s": 14, "zorder": 1} if label == "opponents" else {"s": 28}
        mark = _MARKERS[place % len(_MARKERS)]
        axes.scatter(*zip(*row, strict=True), marker=mark, label=label, **style)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s")
    axes.grid(True, which="major", lw=0.3)
    axes.legend(fontsize=7)
    return _save(figure, result.path.with_name(f"{result.theme}_roofline.png")), absent


def _size_and_rates(
    comparison: Comparison | KernelComparison,
) -> tuple[str, float, dict[str, float]] | None:
    """What is compared, facts per graph, and graphs per second of each way."""
    about = comparison.about
    graphs = about.get("graphs", about.get("questions"))
    facts = about.get("facts")
    if not isinstance(graphs, int | float) or not isinstance(facts, int | float) or not graphs:
        return None
    if isinstance(comparison, KernelComparison):
        family = f"{comparison.name.partition(': ')[2] or comparison.name}, {about.get('dtype')}"
        rates = {t.name: 1e3 * graphs / t.ms[0] for t in comparison.timings if t.ms is not None}
    else:
        family = _GRAPHS.sub("", comparison.name).replace(f", {about.get('data')}", "")
        rates = {t.name: t.questions_per_s for t in comparison.timings}
    return family, facts / graphs, rates


def throughput(result: Results) -> Path | None:
    """Graphs per second against facts per graph, of layers and steps timed at several sizes."""
    families: dict[str, dict[str, list[tuple[float, float]]]] = {}
    # K by facts per graph; where it is not the same, the title says so.
    instructions: dict[str, dict[float, object]] = defaultdict(dict)
    for comparison in result.comparisons:
        if (found := _size_and_rates(comparison)) is None:
            continue
        family, size, rates = found
        kernel = isinstance(comparison, KernelComparison)
        if kernel and not family.startswith(("layer", "retriever step")):
            continue
        lines = families.setdefault(family, defaultdict(list))
        instructions[family][size] = comparison.about.get("K")
        for way, rate in rates.items():
            lines[way].append((size, rate))
    sizes = {
        name: {size for points in lines.values() for size, _ in points}
        for name, lines in families.items()
    }
    families = {name: lines for name, lines in families.items() if len(sizes[name]) > 1}
    if not families:
        return None
    title = f"{result.theme}: throughput"
    figure, panels = _figure(title, result.machine, len(families))
    for axes, (family, lines) in zip(panels, families.items(), strict=True):
        for place, (way, points) in enumerate(lines.items()):
            mark = _MARKERS[place % len(_MARKERS)]
            axes.plot(*zip(*sorted(points), strict=True), marker=mark, label=way)
        axes.set(xscale="log", yscale="log", xlabel="facts per graph", ylabel="graphs per second")
        counts = instructions[family]
        if len(set(counts.values())) > 1:
            said = (f"K {k} at {size:,.0f} facts" for size, k in sorted(counts.items()))
            family = "; ".join([family, *said])
        axes.set_title(family, fontsize=9)
        axes.grid(True, which="major", lw=0.3)
        axes.legend(fontsize=7)
    return _save(figure, result.path.with_name(f"{result.theme}_throughput.png"))


def step_parts(profile: Profile) -> Path | None:
    """Milliseconds of a step's ranges, one bar for each trace."""
    from matplotlib import colormaps

    traces = {name: ranges for name, ranges in profile.ranges.items() if ranges}
    if not traces:
        return None
    figure, (axes,) = _figure("a training step by its parts, host time", profile.machine)
    used = [part for part in _PARTS if any(part in ranges for ranges in traces.values())]
    colours = colormaps["tab10"].colors
    named: set[str] = set()
    for row, ranges in enumerate(traces.values()):
        left = 0.0
        for part in (part for part in used if part in ranges):
            ms = ranges[part] / profile.steps
            colour = colours[_PARTS.index(part)]
            axes.barh(row, ms, left=left, color=colour, label=None if part in named else part)
            named.add(part)
            left += ms
    axes.set_yticks(range(len(traces)), list(traces))
    axes.set_xlabel("ms per step")
    axes.legend(fontsize=7)
    return _save(figure, profile.path.with_name(f"{profile.path.stem}_parts.png"))
