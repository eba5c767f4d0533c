"""The roofline of a result file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bench.results import Results, describe
from dragkit.observe.gpu import card_spec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vP*Xhd<>"


def _figure(title: str, machine: Mapping[str, object]) -> tuple[Figure, Axes]:
    """A figure without a window, with the title and the machine above it."""
    # Not pyplot, which would need a display or a backend.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 5.4), layout="constrained")
    shown = {key: value for key, value in machine.items() if key not in ("command", "packages")}
    figure.suptitle(f"{title}\n{describe(shown)}", fontsize=9)
    return figure, figure.subplots()


def roofline(result: Results) -> tuple[Path | None, list[str]]:
    """Plots every op's row at its operations per byte and operations per second.

    The slope is the bandwidth of a copy in the same run. On a known GPU the flat lines are the peak
    rates of its data sheet.

    Returns:
        The path of the plot, None without any row, and the names of op comparisons without bytes or
        operations, which are not on it.
    """
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    copies, absent = [], []
    for comparison in result.comparisons:
        dtype = comparison.about.get("dtype")
        # Only ops have a dtype.
        if dtype is None:
            continue
        if not comparison.bytes or not comparison.flops or not comparison.copy_gb_s:
            absent.append(f"{comparison.name}, {dtype}")
            continue
        copies.append(comparison.copy_gb_s)
        for row in comparison.timed:
            label = "peers" if row.peer else f"{row.name}, {dtype}"
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
    for index, (label, row) in enumerate(sorted(points.items())):
        style = {"color": "0.6", "s": 14, "zorder": 1} if label == "peers" else {"s": 28}
        mark = _MARKERS[index % len(_MARKERS)]
        axes.scatter(*zip(*row, strict=True), marker=mark, label=label, **style)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s")
    axes.grid(True, which="major", lw=0.3)
    axes.legend(fontsize=7)
    path = result.path.with_name(f"{result.theme}_roofline.png")
    figure.savefig(path, dpi=130)
    return path, absent
