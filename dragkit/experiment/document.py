"""The document of an experiment: a table by data set, what ran where, the file, the commands."""

from __future__ import annotations

import math
import os
import platform
import shlex
import statistics
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from dragkit import __version__
from dragkit.experiment.execute import command
from dragkit.experiment.plan import Experiment
from dragkit.experiment.results import Row, SetResults
from dragkit.experiment.scores import Difference, Mean

_PACKAGES = ("torch", "transformers", "peft", "numpy")
_UNITS = """Each cell is the mean ± its standard error over seeds, in percent. Metrics `facts-*`
are numbers. A metric's mean is over the test questions on which it is defined."""
_DIFFERENCES = """A column `− {baseline}` is the difference of the metric before it to `{baseline}`
on the same questions with the same seeds, with its 95 % interval by a bootstrap over seeds and
questions."""


def commit() -> str:
    """The commit of the code, with a plus sign if it has changes. The version without git."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=10"]
    try:
        run = subprocess.run([*git, "--dirty=+"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"dragkit {__version__}"
    return run.stdout.strip()


def scale(metric: str) -> tuple[float, int]:
    """Factor and decimals with which a metric is shown: numbers of facts are no fractions."""
    return (1.0, 2) if metric.startswith("facts-") else (100.0, 1)


def document(
    experiment: Experiment,
    results: Sequence[SetResults],
    *,
    file: Path,
    plot: Path,
    threads: int,
    gpus: Sequence[str],
) -> str:
    """The document as Markdown.

    Args:
        experiment: the experiment.
        results: of each data set.
        file: the experiment's file.
        plot: the plot, beside the document.
        threads: CPU threads of a run.
        gpus: numbers of the GPUs. Empty for runs on the CPU.
    """
    parts = [f"# {experiment.file.name.capitalize()}"]
    parts += [experiment.file.introduction.strip()] if experiment.file.introduction else []
    parts.append(_made(results, file, threads, gpus))
    baseline = experiment.file.baseline
    parts.append(_UNITS)
    parts += [_DIFFERENCES.format(baseline=baseline)] if baseline else []
    parts.append(f"![Arms by metric and data set]({plot.name})")
    parts += [_section(experiment, result) for result in results]
    parts.append(f"## The experiment\n\n```yaml\n{experiment.text.strip()}\n```")
    first = experiment.runs[0]
    shown = [r for r in experiment.runs if (r.data, r.seed) == (first.data, first.seed)]
    root = Path("runs", "experiments", experiment.file.name)
    lines = [command_line(command(run, root, threads, gpu=bool(gpus))) for run in shown]
    parts.append(f"The commands of {first.data} with seed {first.seed}:")
    parts.append("\n".join(["```", *lines, "```"]))
    return "\n\n".join(parts) + "\n"


def command_line(arguments: Sequence[str]) -> str:
    """A command for a shell, which is to replace the variables."""
    words = [
        f'"{word}"' if "${" in word and not set(word) & set('"\\`') else shlex.quote(word)
        for word in arguments
    ]
    return f"python -m dragkit.train {' '.join(words)}"


def _made(results: Sequence[SetResults], file: Path, threads: int, gpus: Sequence[str]) -> str:
    """Date, commits, versions and machine. A path of this machine alone is left out."""
    name = file.name if file.is_absolute() else file
    commits = sorted(set().union(*(result.commits for result in results)))
    versions = ", ".join(f"{package} {version(package)}" for package in _PACKAGES)
    return (
        f"Made on {time.strftime('%Y-%m-%d')} by `python -m dragkit.experiment {name}` at commit "
        f"{', '.join(commits)} with Python {platform.python_version()}, {versions}, on "
        f"{_machine(gpus)}, {threads} CPU {'thread' if threads == 1 else 'threads'} a run."
    )


def _machine(gpus: Sequence[str]) -> str:
    """The names of the GPUs, or that of the processor."""
    if gpus:
        import torch

        names = [torch.cuda.get_device_name(int(gpu)) for gpu in gpus]
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    name, path = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        name = next(models, name)
    return f"{name} ({os.cpu_count()} cores)"


def _section(experiment: Experiment, result: SetResults) -> str:
    """The table of a data set with arms as rows."""
    metrics, baseline = experiment.file.metrics, experiment.file.baseline
    columns = ["seeds"]
    for metric in metrics:
        columns += [metric, *([f"− {baseline}"] if baseline else [])]
    lines = [f"| arm | {' | '.join([*columns, 's / run'])} |"]
    lines.append("| --- |" + " ---: |" * (len(columns) + 1))
    for row in result.rows.values():
        lines.append(f"| {row.label} | {' | '.join(_cells(row, metrics, baseline))} |")
    asked = f"{len(result.ids)} test questions."
    hashes = [
        f"{key.partition('heuristics_path')[0].rstrip('_') or 'train'} {digest[:12]}"
        for key, digest in result.fingerprints.items()
    ]
    asked += f" SHA-256 of the question files: {', '.join(hashes)}." if hashes else ""
    return f"## {result.name}\n\n{asked}\n\n" + "\n".join(lines)


def _cells(row: Row, metrics: Sequence[str], baseline: str | None) -> list[str]:
    cells = [str(len(row.runs))]
    for metric in metrics:
        cells.append(_mean(metric, row.means.get(metric)))
        if baseline:
            cells.append(_difference(metric, row.differences.get(metric)))
    seconds = statistics.fmean(row.seconds.values()) if row.seconds else None
    return [*cells, "-" if seconds is None else f"{seconds:.0f}"]


def _mean(metric: str, value: Mean | None) -> str:
    if value is None:
        return "-"
    factor, decimals = scale(metric)
    error = "-" if math.isnan(value.error) else f"{factor * value.error:.{decimals}f}"
    return f"{factor * value.mean:.{decimals}f} ± {error}"


def _difference(metric: str, value: Difference | None) -> str:
    if value is None:
        return ""
    factor, decimals = scale(metric)
    # Adding 0 turns -0.0 into 0.0.
    mean, low, high = (
        round(factor * x, decimals) + 0.0 for x in (value.mean, value.low, value.high)
    )
    return f"{mean:+.{decimals}f} [{low:+.{decimals}f}, {high:+.{decimals}f}]"
