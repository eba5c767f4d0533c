"""Tables, plots, comparisons and projections from the files that the benchmarks write.

    python -m bench.report [FOLDER ...]             Markdown tables; PNG plots beside the files
    python -m bench.report --compare OLD NEW        ratios of medians
    python -m bench.report --project b200 FOLDER    data sheet arithmetic, labelled as such

Exit codes: 0 done, 1 one of our rows became slower than `--threshold` allows, 2 usage, different
devices or nothing to project from, 65 a damaged or foreign file, 66 a missing one.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.results import Comparison, Profile, ResultError, Results, Timing, describe, read_all
from dragkit.observe.gpu import CardSpec, card_spec

_RESULTS = Path(__file__).resolve().parent / "results"
SLOWER, USAGE, DAMAGED, MISSING = 1, 2, 65, 66
LABEL = "projection, not measured"
# float32 rows are held to float32's accuracy, which the tensor cores' tf32 does not reach.
_UNITS = {"bfloat16": "bf16_tflops", "float16": "bf16_tflops", "float32": "fp32_tflops"}
# What may explain a difference between two runs of one device.
_SETTINGS = ("threads", "cpu_capability", "python")


class NotComparable(Exception):
    """The runs cannot be compared, or nothing can be projected from them."""


def say(text: str = "") -> None:
    """A line of the report."""
    sys.stdout.write(text + "\n")


def profile_table(profile: Profile) -> str:
    """Milliseconds per step of every range, one column for each trace."""
    ranges = {name: trace.ranges for name, trace in profile.traces.items()}
    lines = ["### a training step by its parts", "", describe(profile.machine), ""]
    lines.append(f"| range, ms per step of {profile.num_steps} | {' | '.join(ranges)} |")
    lines.append(f"|---|{'---:|' * len(ranges)}")
    for name in sorted({name for found in ranges.values() for name in found}):
        ms = [found[name].ms if name in found else None for found in ranges.values()]
        cells = ("" if value is None else f"{value / profile.num_steps:.3f}" for value in ms)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _draw(results: Sequence[Results], profiles: Sequence[Profile]) -> None:
    from bench import plots

    for result in results:
        path, absent = plots.roofline(result)
        if path is None:
            continue
        say(f"plot: {path}")
        if absent:
            say(f"not on the roofline, bytes or operations are not counted: {'; '.join(absent)}")
    for profile in profiles:
        if (made := plots.step_parts(profile)) is not None:
            say(f"plot: {made}")


def report(paths: Sequence[Path], *, draw: bool) -> None:
    """Prints every table, and draws."""
    results, profiles = read_all(paths)
    for result in results:
        say(f"## {result.theme}\n")
        for comparison in result.comparisons:
            say(comparison.markdown(describe(result.machine)))
    for profile in profiles:
        say(profile_table(profile))
    if draw and importlib.util.find_spec("matplotlib") is None:
        say("no plots: matplotlib is not installed (pip install 'dragkit[bench]')")
    elif draw:
        _draw(results, profiles)


def rows(results: Sequence[Results]) -> dict[str, Timing]:
    """Every contender of every comparison by a name. A name that occurs again is numbered."""
    found: dict[str, Timing] = {}
    seen: Counter[str] = Counter()
    for result in results:
        for comparison in result.comparisons:
            for timing in comparison.timings:
                name = f"{result.theme}: {_title(comparison)}: {timing.name}"
                seen[name] += 1
                found[name if seen[name] == 1 else f"{name} (no. {seen[name]})"] = timing
    return found


def _title(comparison: Comparison) -> str:
    dtype = comparison.about.get("dtype")
    return f"{comparison.name}, {dtype}" if dtype else comparison.name


def _device(results: Sequence[Results], label: str) -> str:
    devices = sorted({str(result.machine["device"]) for result in results})
    if len(devices) != 1:
        raise NotComparable(f"the {label} holds runs of {len(devices)} devices: {devices}")
    return devices[0]


def _notes(first: dict[str, object], second: dict[str, object]) -> list[str]:
    """Settings and versions that differ between two runs of one device."""
    settings = []
    for machine in (first, second):
        packages = machine.get("packages")
        known = packages if isinstance(packages, dict) else {}
        settings.append({key: machine.get(key) for key in _SETTINGS} | known)
    one, other = settings
    return [
        f"note: {key} differs: {value} and {other[key]}"
        for key, value in one.items()
        if value is not None and other.get(key) is not None and value != other[key]
    ]


def _only_in(a: dict[str, Timing], b: dict[str, Timing], label: str) -> Iterator[str]:
    for name, row in a.items():
        if name not in b:
            yield f"- only in the {label}: {name}"
        elif row.ms is not None and b[name].ms is None:
            yield f"- timed only in the {label}: {name}"


def compare(
    first: Sequence[Results], second: Sequence[Results], threshold: float
) -> tuple[list[str], list[str]]:
    """Ratios of the second run's medians to the first's.

    Args:
        first, second: all files of a run, at least one each.
        threshold: 0.1 lets a row take up to 1.1 times as long. Opponents are listed and never
            judged: they tell whether the machine was as fast.

    Returns:
        Lines to print, and the names of our rows that are slower than allowed.

    Raises:
        NotComparable: the runs are not of one device.
    """
    devices = _device(first, "first"), _device(second, "second")
    if devices[0] != devices[1]:
        raise NotComparable(
            f"{devices[0]} and {devices[1]} are different devices: a ratio of their times says "
            "nothing about the code"
        )
    a, b = rows(first), rows(second)
    lines = [f"device {devices[0]}", *_notes(first[0].machine, second[0].machine), ""]
    lines += ["| row | first ms | second ms | second / first | |", "|---|---:|---:|---:|---|"]
    opponents, slower = [], []
    for name in (name for name in a if name in b):
        before, after = a[name].ms, b[name].ms
        if before is None or after is None:
            continue
        ratio, word = after[0] / before[0], ""
        if a[name].peer:
            word = "opponent"
            opponents.append(ratio)
        elif ratio > 1 + threshold:
            word = "SLOWER"
            slower.append(name)
        elif ratio < 1 / (1 + threshold):
            word = "faster"
        lines.append(f"| {name} | {before[0]:.4g} | {after[0]:.4g} | {ratio:.3f} | {word} |")
    lines += ["", *_only_in(a, b, "first"), *_only_in(b, a, "second")]
    if opponents:
        middle = statistics.median(opponents)
        lines.append(f"opponents: median ratio {middle:.3f} of {len(opponents)} rows")
    lines.append(f"{len(slower)} of our rows slower by more than {threshold:.0%}")
    return lines, slower


def ceiling(spec: CardSpec, num_bytes: float, flops: float, dtype: str) -> tuple[float, str]:
    """The least ms that a data sheet allows, and what decides: "memory" or "arithmetic"."""
    memory = num_bytes / (spec.memory_gb_per_s * 1e6)
    arithmetic = flops / (getattr(spec, _UNITS[dtype]) * 1e9)
    return (memory, "memory") if memory >= arithmetic else (arithmetic, "arithmetic")


def _projected(result: Results, target: str, there: CardSpec) -> Iterator[str]:
    """A line for every row: its time on `there` if it reaches the same share of its ceiling.

    Both ceilings are those of data sheets. A copy reaches less than the sheet says on either
    device, so a share of a measured copy would be too large for the other's sheet.
    """
    gpu = result.machine.get("gpu")
    if not isinstance(gpu, str):
        device = result.machine["device"]
        raise NotComparable(f"{result.path}: was measured on {device}, which is no GPU")
    if (here := card_spec(gpu)) is None:
        raise NotComparable(f"{result.path}: the peak rates of {gpu} are not known")
    for comparison in result.comparisons:
        title, dtype = _title(comparison), str(comparison.about.get("dtype"))
        if comparison.bytes is None or comparison.flops is None or dtype not in _UNITS:
            yield f"{title}: refused, its bytes and operations are not counted"
            continue
        work = (comparison.bytes, comparison.flops, dtype)
        (now_ms, now), (then_ms, then) = ceiling(here, *work), ceiling(there, *work)
        for row in (row for row in comparison.timings if row.ms is not None):
            share = now_ms / row.ms[0]
            yield (
                f"{title}: {row.name}: {then_ms / share:.4g} ms on {target} by {then} "
                f"({gpu}: {row.ms[0]:.4g} ms, {share:.1%} of its {now} ceiling)"
            )


def project(results: Sequence[Results], target: str) -> list[str]:
    """What measured kernels might take on another GPU: arithmetic on data sheets.

    Args:
        results: of a GPU whose peak rates are known; target: such as "b200".

    Raises:
        NotComparable: an unknown target, rows of a CPU, or no rows.
    """
    name = target.upper()
    if (there := card_spec(name)) is None:
        raise NotComparable(f"the peak rates of {target} are not known")
    found = [line for result in results for line in _projected(result, name, there)]
    if not found:
        raise NotComparable("there are no rows of kernel benchmarks")
    lines = [
        f"{name}: {there.memory_gb_per_s / 1e3:g} TB/s, {there.bf16_tflops:,g} TFLOP/s dense "
        "bfloat16, by its data sheet; each row at the share of its ceiling that it reached where "
        "it was measured",
        "a small share means that launches or latency decide: that time does not shrink with a "
        "peak rate",
    ]
    return [f"{LABEL}: {line}" for line in [*lines, *found]]


def _compare_folders(folders: Sequence[Path], threshold: float) -> int:
    runs = []
    for path in folders:
        results, _ = read_all([path])
        if not results:
            raise ResultError(path, "holds no timings", missing=True)
        runs.append(results)
    lines, slower = compare(*runs, threshold)
    say("\n".join(lines))
    return SLOWER if slower else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--no-plots", action="store_true", help="tables only")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    what.add_argument("--project", metavar="GPU", help="such as b200")
    parser.add_argument(
        "--threshold", type=float, default=0.1, help="0.1 lets a row take 1.1 times as long"
    )
    args = parser.parse_args(arguments)
    if args.compare and args.folders:
        parser.error("--compare takes two folders and no others")
    if not 0 <= args.threshold < float("inf"):
        parser.error(f"--threshold {args.threshold} is no share")
    folders = args.folders or [_RESULTS]
    try:
        if args.compare:
            return _compare_folders(args.compare, args.threshold)
        if args.project:
            say("\n".join(project(read_all(folders)[0], args.project)))
        else:
            report(folders, draw=not args.no_plots)
    except ResultError as error:
        sys.stderr.write(f"bench.report: {error}\n")
        return MISSING if error.missing else DAMAGED
    except NotComparable as error:
        sys.stderr.write(f"bench.report: {error}\n")
        return USAGE
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
