"""The contents of result files: reading them with every field checked, and Markdown tables.

This module needs no torch, so that any machine can read the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import msgspec

# Median, 20th and 80th percentile.
Spread = tuple[float, float, float]

# Files of the device suite that hold no timings.
_NO_TIMINGS = ("env.json", "profile.json", "summary.json")
# Fields of earlier files that are now computed when a table is printed.
_DERIVED = {"host_ms", "ratio", "gb_s", "copy_share", "tflop_s"}


class ResultError(Exception):
    """A file or folder cannot be used. The message names it and says why."""

    def __init__(self, path: Path, problem: str, *, missing: bool = False) -> None:
        super().__init__(f"{path}: {problem}")
        self.missing = missing


class Rates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rates of a language model.

    Attributes:
        tokens_per_s, supervised_tokens_per_s: tokens without padding.
        flop_per_s: model FLOPs.
        mfu: the fraction that `flop_per_s` is of the device's dense bfloat16 rate.
        joules_per_question: energy of the whole board, by the GPU's own counter.
    """

    tokens_per_s: float
    supervised_tokens_per_s: float | None = None
    flop_per_s: float | None = None
    mfu: float | None = None
    joules_per_question: float | None = None


class Timing(msgspec.Struct, forbid_unknown_fields=True):
    """One contender of a comparison.

    Attributes:
        peer: written with other libraries. A slower peer is no regression.
        ms: of a call. It is wall time on a CPU, and time between two events with a cold L2 cache on
            CUDA. None if the contender was not timed, and `note` then says why.
        cpu_ms: median processor time of all threads, on a CPU.
        peak_mb: memory above what was allocated before, on CUDA.
        launches: calls that start work on CUDA, and innermost PyTorch operators on a CPU.
        error: largest norm of a difference from float64 over the norm of the float64 value.
    """

    name: str
    peer: bool = False
    ms: Spread | None = None
    cpu_ms: float | None = None
    peak_mb: float | None = None
    launches: int | None = None
    error: float | None = None
    rates: Rates | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.ms is None:
            return
        median, low, high = self.ms
        # Interpolated percentiles of equal values differ in their last digits.
        slack = 1e-9 * abs(median)
        if not 0 <= low <= median + slack or not median <= high + slack:
            raise ValueError(f"ms: {median} is not between the percentiles {low} and {high}")


class Comparison(msgspec.Struct, forbid_unknown_fields=True):
    """Contenders on one problem, ours first.

    Attributes:
        about: sizes and settings.
        questions: that one call processes, if it processes questions.
        copy_gb_s: GB/s of a copy in the same run.
        bytes, flops: the fewest that a call moves and computes. None if they are not counted.
    """

    name: str
    about: dict[str, object]
    timings: list[Timing]
    questions: int | None = None
    copy_gb_s: float | None = None
    bytes: float | None = None
    flops: float | None = None

    @property
    def timed(self) -> list[Timing]:
        """The contenders that were timed."""
        return [timing for timing in self.timings if timing.ms is not None]

    def markdown(self, head: str = "") -> str:
        """A table of the contenders that were timed, with `head` above it.

        "ms / ours" is a contender's time over that of the first row.
        """
        sizes = ", ".join(f"{key} {value}" for key, value in self.about.items())
        lines = [f"### {self.name}", ""]
        for text in filter(None, (head, sizes)):
            lines += [text, ""]
        rows = self.timed
        cells = [{"contender": row.name} | self._cells(row, rows[0]) for row in rows]
        titles = [t for t in dict.fromkeys(chain(*cells)) if any(c.get(t) for c in cells)]
        if titles:
            lines += [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
        lines += [f"| {' | '.join(c.get(title, '') for title in titles)} |" for c in cells]
        peers = [row for row in rows if row.peer]
        if peers and len(peers) < len(rows):
            peer = min(peers, key=lambda row: row.ms[0])
            ours = min((row for row in rows if not row.peer), key=lambda row: row.ms[0])
            ratio = peer.ms[0] / ours.ms[0]
            lines += [
                "",
                f"Strongest peer: {peer.name}, {ratio:.2f} times the time of {ours.name}.",
            ]
        if absent := [f"- {row.name}: {row.note}" for row in self.timings if row.ms is None]:
            lines += ["", "Not timed:", "", *absent]
        return "\n".join(lines) + "\n"

    def _cells(self, row: Timing, first: Timing) -> dict[str, str]:
        """Titles and formatted numbers. A number that cannot be computed is empty."""
        (ms, low, high), rates = row.ms, row.rates
        gb_s = _quotient(self.bytes, ms * 1e6)
        numbers: dict[str, tuple[float | None, str]] = {
            "ms / ours": (ms / first.ms[0], ".2f"),
            "CPU ms": (row.cpu_ms, ".4g"),
            "CPU ms / ours": (_quotient(row.cpu_ms, first.cpu_ms), ".2f"),
            "questions/s": (_quotient(self.questions, ms / 1e3), ".1f"),
            "GB/s": (gb_s, ".3g"),
            "of copy": (_quotient(gb_s, self.copy_gb_s), ".2g"),
            "TFLOP/s": (_quotient(self.flops, ms * 1e9), ".3g"),
            "peak MB": (row.peak_mb, ".1f"),
            "launches": (row.launches, "d"),
            "error": (row.error, ".0e"),
        }
        if rates is not None:
            numbers |= {
                "tokens/s": (rates.tokens_per_s, ".0f"),
                "supervised tokens/s": (rates.supervised_tokens_per_s, ".0f"),
                "model GFLOP/s": (_quotient(rates.flop_per_s, 1e9), ".4g"),
                "MFU": (rates.mfu, ".3g"),
                "J/question": (rates.joules_per_question, ".3g"),
            }
        texts = {
            title: "" if value is None else format(value, form)
            for title, (value, form) in numbers.items()
        }
        return {"ms (p20-p80)": f"{ms:.4g} ({low:.4g}-{high:.4g})"} | texts


def _quotient(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by


def describe(machine: Mapping[str, object]) -> str:
    """Device, versions, date, commit and command in one line, without what is not known."""
    texts = [str(machine.get("device", "device not recorded"))]
    if capability := machine.get("cpu_capability"):
        texts[0] += f" ({capability})"
    if threads := machine.get("threads"):
        texts.append(f"{threads} threads" if threads != 1 else "1 thread")
    packages = machine.get("packages")
    versions = packages if isinstance(packages, Mapping) else {}
    for name, version in {"Python": machine.get("python"), **versions}.items():
        texts += [f"{name} {version}"] if version else []
    for key, form in (("date", "{}"), ("commit", "commit {}"), ("command", "`{}`")):
        texts += [form.format(machine[key])] if machine.get(key) else []
    return ", ".join(texts)


class Results(msgspec.Struct):
    """One file of timings.

    Attributes:
        machine: device, versions, date, commit, command.
    """

    machine: dict[str, object]
    comparisons: list[Comparison]
    path: Path = Path()

    def __post_init__(self) -> None:
        if not isinstance(self.machine.get("device"), str):
            raise ValueError("machine: has no device")

    @property
    def theme(self) -> str:
        """What was measured: the file's name."""
        return self.path.stem


def _from_earlier_format(comparison: dict) -> dict:
    """A comparison as earlier versions wrote it, in the present fields."""
    timings = comparison.get("timings")
    if not timings or not timings[0].keys() & {"wall_ms", "host_ms"}:
        return comparison
    rows = []
    for number, timing in enumerate(timings):
        row = {key: value for key, value in timing.items() if key not in _DERIVED}
        if "wall_ms" in row:
            row = {
                "name": row["name"],
                # Earlier files of steps do not mark peers.
                "peer": number > 0 and not row["name"].startswith("dragkit"),
                "ms": row["wall_ms"],
                "cpu_ms": row["cpu_ms"][0],
                "rates": row.get("rates"),
            }
            questions = timing["questions_per_s"] * row["ms"][0] / 1e3
            comparison = comparison | {"questions": round(questions)}
        rows.append(row)
    return comparison | {"timings": rows}


def read_results(path: Path) -> Results:
    """A file of timings, of this version or an earlier one.

    Raises:
        ResultError: the file is missing, damaged, or no result file.
    """
    try:
        content = msgspec.json.decode(path.read_bytes(), type=dict[str, object])
        if rows := content.get("comparisons"):
            content["comparisons"] = [_from_earlier_format(row) for row in rows]
        results = msgspec.convert(content, Results)
    except OSError as error:
        raise ResultError(path, error.strerror or str(error), missing=True) from error
    except (msgspec.DecodeError, AttributeError, LookupError, TypeError) as error:
        raise ResultError(path, f"is no result file: {error}") from error
    results.path = path
    return results


def _files(path: Path) -> list[Path]:
    """The JSON files of a folder, or of its devices' folders, or the file itself."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ResultError(path, "no such file or folder", missing=True)
    # A folder of results has one folder for each device.
    for pattern in ("*.json", "*/*.json"):
        if files := sorted(f for f in path.glob(pattern) if f.name not in _NO_TIMINGS):
            return files
    raise ResultError(path, "holds no result files", missing=True)


def read_all(paths: Sequence[Path]) -> list[Results]:
    """Everything in files and folders.

    Raises:
        ResultError: names the first file or folder that cannot be used.
    """
    return [read_results(file) for path in paths for file in _files(path)]
