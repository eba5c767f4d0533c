"""Reading result files back: every field is checked, and what is wrong is named with its file.

The standard library is enough for it, so that files can be looked at on any machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from bench.tables import (
    Comparison,
    KernelComparison,
    KernelTiming,
    Rates,
    Spread,
    Timing,
)

# Files of the device suite that hold no timings of their own.
_BESIDE = ("env.json", "summary.json")
PROFILE = "profile.json"


class ResultError(Exception):
    """A file or folder that cannot be used, with its name and why."""

    def __init__(self, path: Path, problem: str, *, missing: bool = False) -> None:
        super().__init__(f"{path}: {problem}")
        self.missing = missing


@dataclass(frozen=True, slots=True)
class Results:
    """One file of timings.

    Attributes:
        path: of the file; machine: device, versions, date, commit, command.
    """

    path: Path
    machine: dict[str, object]
    comparisons: list[Comparison | KernelComparison]

    @property
    def theme(self) -> str:
        """What was measured: the file's name."""
        return self.path.stem


@dataclass(frozen=True, slots=True)
class Profile:
    """The ranges of profiled training steps.

    Attributes:
        path, machine: as above; an earlier version wrote no machine.
        steps: in each trace; ranges: trace name to range name to milliseconds of all steps.
    """

    path: Path
    machine: dict[str, object]
    steps: int
    ranges: dict[str, dict[str, float]]


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: a finite number is expected, not {value!r}")
    return value


def _spread(value: object, where: str) -> Spread:
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError(f"{where}: median, 20th and 80th percentile are expected, not {value!r}")
    middle, low, high = (_number(x, where) for x in value)
    # Interpolated percentiles of equal values differ in their last digits.
    room = 1e-9 * abs(middle)
    if not 0 <= low <= middle + room or not middle <= high + room:
        raise ValueError(f"{where}: {middle} between {low} and {high} is no median of times")
    return middle, low, high


def _arguments(kind: type, data: object, where: str) -> dict[str, object]:
    """The object's fields, all of `kind` and none missing."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: an object is expected, not {type(data).__name__}")
    known = {f.name: f for f in fields(kind)}
    if unknown := sorted(set(data) - set(known)):
        raise ValueError(f"{where}: unknown field {unknown[0]!r}")
    for name, f in known.items():
        needed = f.default is MISSING and f.default_factory is MISSING
        if needed and name not in data:
            raise ValueError(f"{where}: the field {name!r} is missing")
        if name == "name" and not isinstance(data[name], str):
            raise ValueError(f"{where}: the name is no text")
    return dict(data)


def _timing(data: object, where: str) -> Timing:
    values = _arguments(Timing, data, where)
    for key, value in values.items():
        if key in ("wall_ms", "cpu_ms"):
            values[key] = _spread(value, f"{where}.{key}")
        elif key == "rates" and value is not None:
            inner = _arguments(Rates, value, f"{where}.rates")
            for name, number in inner.items():
                if number is not None:
                    _number(number, f"{where}.rates.{name}")
            values[key] = Rates(**inner)
        elif key not in ("name", "rates"):
            _number(value, f"{where}.{key}")
    return Timing(**values)


def _kernel_timing(data: object, where: str) -> KernelTiming:
    values = _arguments(KernelTiming, data, where)
    for key, value in values.items():
        if value is None or key in ("name", "peer", "note"):
            continue
        place = f"{where}.{key}"
        values[key] = _spread(value, place) if key == "ms" else _number(value, place)
    return KernelTiming(**values)


def comparison_from(data: object, where: str) -> Comparison | KernelComparison:
    """A comparison as it stands in a result file; `where` names it in messages.

    Raises:
        ValueError: it is none, with the place and what is wrong.
    """
    timings = data.get("timings") if isinstance(data, dict) else None
    if not isinstance(timings, list) or not all(isinstance(row, dict) for row in timings):
        raise ValueError(f"{where}: no list of timings")
    if not timings:
        raise ValueError(f"{where}: no timing at all")
    plain = "wall_ms" in timings[0]
    kind, row_of = (Comparison, _timing) if plain else (KernelComparison, _kernel_timing)
    values = _arguments(kind, data, where)
    if not isinstance(values["about"], dict):
        raise ValueError(f"{where}.about: an object is expected")
    for key in ("copy_gb_s", "bytes", "flops"):
        if values.get(key) is not None:
            _number(values[key], f"{where}.{key}")
    values["timings"] = [row_of(row, f"{where}.timings[{i}]") for i, row in enumerate(timings)]
    return kind(**values)


def _load(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(path, error.strerror or str(error), missing=True) from error
    except UnicodeDecodeError as error:
        raise ResultError(path, f"is no text: {error}") from error
    except json.JSONDecodeError as error:
        raise ResultError(path, f"is no JSON, or cut off: {error}") from error
    if not isinstance(content, dict):
        raise ResultError(path, "holds no object")
    return content


def _machine(content: dict) -> dict[str, object]:
    machine = content.get("machine")
    if not isinstance(machine, dict) or not isinstance(machine.get("device"), str):
        raise ValueError("no machine with a device, so it is no result file of these benchmarks")
    return machine


def read_results(path: Path) -> Results:
    """A file of timings.

    Raises:
        ResultError: missing, damaged, or something else.
    """
    content = _load(path)
    try:
        machine, rows = _machine(content), content.get("comparisons")
        if not isinstance(rows, list):
            raise ValueError("no list of comparisons")
        found = [comparison_from(row, f"comparisons[{i}]") for i, row in enumerate(rows)]
    except ValueError as error:
        raise ResultError(path, str(error)) from error
    return Results(path, machine, found)


def read_profile(path: Path) -> Profile:
    """The device suite's `profile.json`.

    Raises:
        ResultError: missing, damaged, or something else.
    """
    content = _load(path)
    try:
        machine = _machine(content) if "machine" in content else {}
        first, _, last = str(content["steps"]).partition(":")
        steps = int(last) - int(first)
        if steps < 1:
            raise ValueError(f"steps {content['steps']!r}: the last is not behind the first")
        ranges = {
            trace: {
                name: _number(row["ms"], f"traces.{trace}.ranges.{name}")
                for name, row in kinds["ranges"].items()
            }
            for trace, kinds in content["traces"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ResultError(path, f"is no profile of the device suite: {error!r}") from error
    except ValueError as error:
        raise ResultError(path, str(error)) from error
    return Profile(path, machine, steps, ranges)


def result_files(path: Path) -> list[Path]:
    """The JSON files of a folder, or of its devices' folders, or the file itself.

    Raises:
        ResultError: there is nothing of the kind.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ResultError(path, "no such file or folder", missing=True)
    for pattern in ("*.json", "*/*.json"):
        if found := sorted(f for f in path.glob(pattern) if f.name not in _BESIDE):
            return found
    raise ResultError(path, "holds no result files", missing=True)


def read_all(paths: Sequence[Path]) -> tuple[list[Results], list[Profile]]:
    """Everything in files and folders.

    Raises:
        ResultError: the first that cannot be used.
    """
    results, profiles = [], []
    for file in (file for path in paths for file in result_files(path)):
        if file.name == PROFILE:
            profiles.append(read_profile(file))
        else:
            results.append(read_results(file))
    return results, profiles
