"""`data stats`: tables and histograms of files of questions."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from dragkit.console import output_bytes, output_file, show
from dragkit.data.build.check import require_files
from dragkit.data.build.figure_table import column_names, markdown_table
from dragkit.data.build.figures import Figures, read_figures
from dragkit.errors import DataError, MissingInputError

# Okabe and Ito's colours, which colour-blind readers can tell apart. Lines differ by dashes too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES = ("-", "--", "-.", ":")
_PANELS = ("facts", "hops", "answers", "positive_facts", "relations")
# Larger numbers than this are drawn in bins that grow with them.
_MAX_BARS = 60


def write_stats(
    paths: Sequence[Path], *, plot: Path | None = None, output: Path | None = None
) -> None:
    """Reads files of questions and writes their table and their histograms.

    Args:
        paths: JSONL, plain or gzip.
        plot: PNG to write.
        output: Markdown file to write. None takes standard output.

    Raises:
        MissingInputError: files cannot be read, or matplotlib is not installed.
        DataError: lists all unusable rows of all files. Nothing is written then.
        WriteError: an output cannot be written.
    """
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise MissingInputError(
            "the plot needs matplotlib, which is not installed: pip install 'dragkit[experiment]'"
        )
    require_files(paths)
    with ExitStack() as stack:
        # Outputs that cannot be created are refused before the files are read.
        text = image = None
        if output is not None:
            text = stack.enter_context(output_file(output, "Change --output."))
        if plot is not None:
            image = stack.enter_context(output_bytes(plot, "Change --plot."))
        found = [read_figures(path) for path in paths]
        if errors := [str(error) for _, error in found if error is not None]:
            raise DataError("\n".join(errors))
        files = [figures for figures, _ in found]
        if image is not None:
            _draw(files, image)
        if text is None:
            show(markdown_table(files))
        else:
            text.write(f"{markdown_table(files)}\n")


def bin_edges(high: int) -> np.ndarray:
    """Edges of bins for the numbers 0 to `high`: single numbers, or of growing width if many.

    Args:
        high: at least 0.

    Returns:
        float64, from -0.5 to `high` + 0.5.
    """
    if high < _MAX_BARS:
        return np.arange(high + 2) - 0.5
    ends = np.unique(np.rint(np.geomspace(1, high + 1, _MAX_BARS // 2)))
    return np.concatenate([[-0.5], ends - 0.5])


def _values(figures: Figures, name: str) -> np.ndarray:
    if name != "hops":
        return np.frombuffer(figures.values[name], dtype=np.int64)
    hops = sorted(n for n in figures.hops if n >= 0)
    return np.repeat(np.array(hops, dtype=np.int64), [figures.hops[n] for n in hops])


def _draw(files: Sequence[Figures], file: io.BytesIO) -> None:
    """Draws one panel per number, with one line per file, as PNG."""
    # Not pyplot, which would need a display or a backend.
    from matplotlib.figure import Figure

    figure = Figure((11, 6.5), facecolor="white", layout="constrained", dpi=120)
    panels = list(figure.subplots(2, 3).flat)
    for axes, name in zip(panels, _PANELS, strict=False):
        values = [_values(figures, name) for figures in files]
        # Bins of one width for all files, so that heights can be compared.
        edges = bin_edges(max(int(v.max(initial=0)) for v in values))
        for place, numbers in enumerate(values):
            counts, _ = np.histogram(numbers, edges)
            axes.stairs(
                100 * counts / max(1, files[place].counts["questions"]),
                edges,
                color=_COLOURS[place % len(_COLOURS)],
                linestyle=_DASHES[place % len(_DASHES)],
                linewidth=1.5,
            )
        label = "hops from a topic to an answer" if name == "hops" else name.replace("_", " ")
        axes.set(xlabel=f"{label} of a question", ylabel="questions (%)")
        axes.set_ylim(0)
        if edges[-1] > _MAX_BARS:
            axes.set_xscale("symlog", linthresh=1)
            ticks = [0, *(10**n for n in range(len(str(int(edges[-1])))))]
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xlim(edges[0], edges[-1])
        axes.grid(True, linewidth=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    legend = panels[-1]
    legend.axis("off")
    for place, name in enumerate(column_names(files)):
        style = {"color": _COLOURS[place % len(_COLOURS)], "ls": _DASHES[place % len(_DASHES)]}
        # A dollar sign would begin a formula.
        label = f"{name} ({files[place].counts['questions']:,})".replace("$", r"\$")
        legend.plot([], [], label=label, **style)
    legend.legend(loc="center", frameon=False, title="file (questions)")
    figure.savefig(file, format="png", metadata={"Software": None})
