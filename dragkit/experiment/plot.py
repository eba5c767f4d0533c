"""The plot of an experiment: one panel per metric, arms as rows, data sets as colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TextIO

from dragkit.experiment.document import scale
from dragkit.experiment.plan import Experiment
from dragkit.experiment.results import Row, SetResults

# Okabe and Ito's colours, which colour-blind readers can tell apart, without yellow on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "os^DvPX"


def draw(experiment: Experiment, results: Sequence[SetResults], file: TextIO) -> None:
    """Writes the plot as SVG.

    With a baseline it shows differences with their 95 % intervals, else means with one standard
    error over seeds.
    """
    # Not pyplot, which would need a display or a backend.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    metrics, baseline = experiment.file.metrics, experiment.file.baseline
    # A phase 1 is not in every set, where arms have settings of their own for it.
    rows = {key: row.label for result in results for key, row in result.rows.items()}
    rows.pop(f"arm-{baseline}", None)
    places = {key: len(rows) - 1 - i for i, key in enumerate(rows)}
    height = 1.4 + len(rows) * (0.16 * len(results) + 0.16)
    # Without these the same results would give another file each time.
    with rc_context({"svg.hashsalt": experiment.file.name, "font.size": 9}):
        figure = Figure((1.4 + 2.6 * len(metrics), height), facecolor="white", layout="constrained")
        panels = list(figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0])
        for axes, metric in zip(panels, metrics, strict=True):
            for i, result in enumerate(results):
                dodge = 0.7 * ((i + 0.5) / len(results) - 0.5)
                points = [
                    (places[key] - dodge, *point)
                    for key, row in result.rows.items()
                    if key in places and (point := _point(row, metric, baseline)) is not None
                ]
                y, x, below, above = zip(*points, strict=True) if points else ((),) * 4
                axes.errorbar(
                    x,
                    y,
                    xerr=(below, above),
                    fmt=_MARKERS[i % len(_MARKERS)],
                    color=_COLOURS[i % len(_COLOURS)],
                    markersize=4,
                    capsize=2,
                    linewidth=1,
                    label=result.name,
                )
            if baseline:
                axes.axvline(0, color="0.5", linewidth=0.8, zorder=0)
            unit = "facts" if scale(metric)[0] == 1 else "points" if baseline else "percent"
            axes.set(title=metric, xlabel=f"{unit} more than {baseline}" if baseline else unit)
            axes.grid(True, axis="x", linewidth=0.3)
            axes.set_yticks(list(places.values()), list(rows.values()))
            axes.hlines(
                [i + 0.5 for i in range(len(rows) - 1)],
                0,
                1,
                "0.85",
                lw=0.3,
                transform=axes.get_yaxis_transform(),
            )
            axes.set_ylim(-0.6, len(rows) - 0.4)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        figure.savefig(file, format="svg", metadata={"Date": None})


def _point(row: Row, metric: str, baseline: str | None) -> tuple[float, float, float] | None:
    """The value with the lengths of its bar to the left and to the right."""
    factor = scale(metric)[0]
    if baseline:
        value = row.differences.get(metric)
        if value is None:
            return None
        # The interval of a skewed draw may miss the mean by a rounding error.
        bar = (max(value.mean - value.low, 0.0), max(value.high - value.mean, 0.0))
        return factor * value.mean, factor * bar[0], factor * bar[1]
    mean = row.means.get(metric)
    if mean is None:
        return None
    error = 0.0 if math.isnan(mean.error) else factor * mean.error
    return factor * mean.mean, error, error
