"""Pictures of result files: a roofline, and a step's parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bench.results import Profile, Results, describe
from dragkit.observe.gpu import card_spec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vP*Xhd<>"
# A trace's ranges are drawn in the order of a step.
_PARTS = ("copy", "replay", "retriever", "sampler", "prompt", "generator", "backward", "optimizer")


def _figure(title: str, machine: Mapping[str, object]) -> tuple[Figure, Axes]:
    """A figure without a window; the title and the machine stand above."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 5.4), layout="constrained")
    shown = {key: value for key, value in machine.items() if key not in ("command", "packages")}
    figure.suptitle(f"{title}\n{describe(shown)}", fontsize=9)
    return figure, figure.subplots()


def roofline(result: Results) -> tuple[Path | None, list[str]]:
    """Every op's row at its operations per byte and operations per second.

    The slope is the bandwidth of a copy in the same run. On a known GPU the flat lines are the peak
    rates of its data sheet.

    Returns:
        The picture, None without any row, and the names of op comparisons that are not on it.
    """
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    copies, absent = [], []
    for comparison in result.comparisons:
        dtype = comparison.about.get("dtype")
        if dtype is None:
            continue
        if not comparison.bytes or not comparison.flops or not comparison.copy_gb_s:
            absent.append(f"{comparison.name}, {dtype}")
            continue
        copies.append(comparison.copy_gb_s)
        for row in (row for row in comparison.timings if row.ms is not None):
            label = "opponents" if row.peer else f"{row.name}, {dtype}"
            rate = comparison.flops / row.ms[0] / 1e6
            points[label].append((comparison.flops / comparison.bytes, rate))
    if not points:
        return None, absent
    figure, axes = _figure(f"{result.theme}: roofline", result.machine)
    intensity = [x for row in points.values() for x, _ in row]
    left, right = min(intensity) / 2, max(intensity) * 2
    copy = max(copies)
    axes.plot([left, right], [copy * left, copy * right], "k-", lw=1, label=f"copy {copy:.4g} GB/s")
    spec = card_spec(str(result.machine.get("gpu")))
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
    path = result.path.with_name(f"{result.theme}_roofline.png")
    figure.savefig(path, dpi=130)
    return path, absent


def step_parts(profile: Profile) -> Path | None:
    """Milliseconds of a step's ranges, one bar for each trace."""
    traces = {name: trace.ranges for name, trace in profile.traces.items() if trace.ranges}
    if not traces:
        return None
    figure, axes = _figure("a training step by its parts, host time", profile.machine)
    names = list(traces)
    left = [0.0] * len(names)
    for part in (part for part in _PARTS if any(part in ranges for ranges in traces.values())):
        found = (ranges.get(part) for ranges in traces.values())
        ms = [0.0 if range_ is None else range_.ms / profile.num_steps for range_ in found]
        axes.barh(names, ms, left=left, label=part)
        left = [a + b for a, b in zip(left, ms, strict=True)]
    axes.set_xlabel("ms per step")
    axes.legend(fontsize=7)
    path = profile.path.with_name(f"{profile.path.stem}_parts.png")
    figure.savefig(path, dpi=130)
    return path
