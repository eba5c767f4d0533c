"""What result files hold: reading them with every field checked, and Markdown tables of them.

Needs no torch, so that files can be looked at on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import msgspec

Spread = tuple[float, float, float]

PROFILE = "profile.json"
# Files of the device suite that hold no timings.
_NO_TIMINGS = ("env.json", "summary.json")
# Fields of earlier files that follow from others. They are computed when a table is printed.
_DERIVED = {"host_ms", "ratio", "gb_s", "copy_share", "tflop_s"}


class ResultError(Exception):
    """A file or folder that cannot be used. The message names it and says why."""

    def __init__(self, path: Path, problem: str, *, missing: bool = False) -> None:
        super().__init__(f"{path}: {problem}")
        self.missing = missing


class Rates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a language model processes each second.

    Attributes:
        tokens_per_s, supervised_tokens_per_s: real tokens, without padding.
        flop_per_s: model FLOPs; mfu: their share of the device's dense bfloat16 rate.
        joules_per_question: of the whole board, by the GPU's own counter.
    """

    tokens_per_s: float
    supervised_tokens_per_s: float | None = None
    flop_per_s: float | None = None
    mfu: float | None = None
    joules_per_question: float | None = None


class Timing(msgspec.Struct, forbid_unknown_fields=True):
    """One contender of a comparison.

    Attributes:
        peer: written with other libraries, so that its slowing down is no regression.
        ms: median, 20th and 80th percentile of a call; wall time on a CPU, time between two events
            with a cold L2 cache on CUDA. None if it was not timed; `note` then says why.
        cpu_ms: median processor time of all threads, on a CPU.
        peak_mb: above what was allocated before, on CUDA.
        launches: calls that start work on CUDA, PyTorch operators without others inside on a CPU.
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
        middle, low, high = self.ms
        # Interpolated percentiles of equal values differ in their last digits.
        slack = 1e-9 * abs(middle)
        if not 0 <= low <= middle + slack or not middle <= high + slack:
            raise ValueError(f"{middle} between {low} and {high} is no median of times")


class Comparison(msgspec.Struct, forbid_unknown_fields=True):
    """Contenders on one problem, ours first.

    Attributes:
        about: sizes and settings; questions: that one call processes, if it processes questions.
        copy_gb_s: GB/s of a copy in the same run.
        bytes, flops: least that a call has to move and to compute; None if they are not counted.
    """

    name: str
    about: dict[str, object]
    timings: list[Timing]
    questions: int | None = None
    copy_gb_s: float | None = None
    bytes: float | None = None
    flops: float | None = None

    def markdown(self, head: str = "") -> str:
        """A table of the contenders that were timed; `head` goes above it.

        "ms / ours" is a contender's time over that of the first row.
        """
        sizes = ", ".join(f"{key} {value}" for key, value in self.about.items())
        lines = [f"### {self.name}", ""]
        for text in filter(None, (head, sizes)):
            lines += [text, ""]
        rows = [row for row in self.timings if row.ms is not None]
        cells = [{"contender": row.name} | self._cells(row, rows[0]) for row in rows]
        used = [title for title in dict.fromkeys(chain(*cells)) if any(c.get(title) for c in cells)]
        if used:
            lines += [f"| {' | '.join(used)} |", f"|---|{'---:|' * (len(used) - 1)}"]
        lines += [f"| {' | '.join(c.get(title, '') for title in used)} |" for c in cells]
        lines += self._strongest_peer(rows)
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
        texts = {title: _text(value, form) for title, (value, form) in numbers.items()}
        return {"ms (p20-p80)": f"{ms:.4g} ({low:.4g}-{high:.4g})"} | texts

    def _strongest_peer(self, rows: Sequence[Timing]) -> list[str]:
        ours = [row for row in rows if not row.peer]
        peers = [row for row in rows if row.peer]
        if not ours or not peers:
            return []
        fast, peer = (min(side, key=lambda row: row.ms[0]) for side in (ours, peers))
        ratio = peer.ms[0] / fast.ms[0]
        return ["", f"Strongest peer: {peer.name}, {ratio:.2f} times the time of {fast.name}."]


def _quotient(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def describe(machine: Mapping[str, object]) -> str:
    """Device, versions, date, commit and command in one line. What is not known is left out."""
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
    parts += [str(machine["date"])] if machine.get("date") else []
    parts += [f"commit {machine['commit']}"] if machine.get("commit") else []
    parts += [f"`{machine['command']}`"] if machine.get("command") else []
    return ", ".join(parts)


class Results(msgspec.Struct):
    """One file of timings.

    Attributes:
        path: of the file; machine: device, versions, date, commit, command.
    """

    path: Path
    machine: dict[str, object]
    comparisons: list[Comparison]

    @property
    def theme(self) -> str:
        """What was measured: the file's name."""
        return self.path.stem


class _Range(msgspec.Struct):
    ms: float


class _Trace(msgspec.Struct):
    ranges: dict[str, _Range]


class Profile(msgspec.Struct):
    """The device suite's record of profiled training steps.

    Attributes:
        steps: "first:end"; traces: the ranges of each trace, over all its steps.
    """

    steps: str
    traces: dict[str, _Trace]
    machine: dict[str, object] = {}
    path: Path = Path()

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"steps {self.steps!r}: the end is not after the first")

    @property
    def num_steps(self) -> int:
        """How many steps each trace holds."""
        first, _, end = self.steps.partition(":")
        return int(end) - int(first)


def _from_earlier_format(data: dict, timings: list[dict]) -> dict:
    """A comparison as earlier versions wrote it, in today's fields."""
    rows = []
    for number, timing in enumerate(timings):
        row = {key: value for key, value in timing.items() if key not in _DERIVED}
        if "wall_ms" in row:
            row = {
                "name": row["name"],
                "peer": number > 0 and not row["name"].startswith("dragkit"),
                "ms": row["wall_ms"],
                "cpu_ms": row["cpu_ms"][0],
                "rates": row.get("rates"),
            }
            questions = timing["questions_per_s"] * row["ms"][0] / 1e3
            data = data | {"questions": round(questions)}
        rows.append(row)
    return data | {"timings": rows}


def _comparison(data: object, where: str) -> Comparison:
    timings = data.get("timings") if isinstance(data, dict) else None
    if isinstance(timings, list) and timings and isinstance(timings[0], dict):
        if timings[0].keys() & {"wall_ms", "host_ms"}:
            data = _from_earlier_format(data, timings)
    else:
        raise ValueError(f"{where}: no list of timings")
    try:
        return msgspec.convert(data, Comparison)
    except msgspec.ValidationError as error:
        raise ValueError(f"{where}: {error}") from error


def _load(path: Path) -> dict:
    try:
        content = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise ResultError(path, error.strerror or str(error), missing=True) from error
    except msgspec.DecodeError as error:
        raise ResultError(path, f"is no JSON, or is cut off: {error}") from error
    if not isinstance(content, dict):
        raise ResultError(path, "holds no object")
    return content


def read_results(path: Path) -> Results:
    """A file of timings, of this version or an earlier one.

    Raises:
        ResultError: the file is missing, damaged, or no result file.
    """
    content = _load(path)
    machine, rows = content.get("machine"), content.get("comparisons")
    if not isinstance(machine, dict) or not isinstance(machine.get("device"), str):
        raise ResultError(path, "no machine with a device: not a result file of these benchmarks")
    if not isinstance(rows, list):
        raise ResultError(path, "no list of comparisons")
    try:
        found = [_comparison(row, f"comparisons[{i}]") for i, row in enumerate(rows)]
    except (ValueError, KeyError, TypeError) as error:
        raise ResultError(path, str(error)) from error
    return Results(path, machine, found)


def read_profile(path: Path) -> Profile:
    """The device suite's `profile.json`.

    Raises:
        ResultError: the file is missing, damaged, or no profile.
    """
    try:
        profile = msgspec.convert(_load(path), Profile)
    except msgspec.ValidationError as error:
        raise ResultError(path, f"is no profile of the device suite: {error}") from error
    profile.path = path
    return profile


def _files(path: Path) -> list[Path]:
    """The JSON files of a folder, or of its devices' folders, or the file itself."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ResultError(path, "no such file or folder", missing=True)
    for pattern in ("*.json", "*/*.json"):
        if found := sorted(f for f in path.glob(pattern) if f.name not in _NO_TIMINGS):
            return found
    raise ResultError(path, "holds no result files", missing=True)


def read_all(paths: Sequence[Path]) -> tuple[list[Results], list[Profile]]:
    """Everything in files and folders.

    Raises:
        ResultError: names the first file or folder that cannot be used.
    """
    files = [file for path in paths for file in _files(path)]
    profiles = [read_profile(file) for file in files if file.name == PROFILE]
    return [read_results(file) for file in files if file.name != PROFILE], profiles
