"""Tables, plots, comparisons and projections from the files that the benchmarks write.

    python -m bench.report [FOLDER ...]             Markdown tables; PNG plots beside the files
    python -m bench.report --compare OLD NEW        ratios of medians
    python -m bench.report --project b200 FOLDER    arithmetic on data sheets, labelled as such

Exit codes: 0 success, 1 one of our rows became slower than `--threshold` allows, 2 wrong usage,
different devices or nothing to project from, 65 a damaged or foreign file, 66 a missing file.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.results import Comparison, ResultError, Results, Timing, describe, read_all
from dragkit.observe.gpu import CardSpec, card_spec

_RESULTS = Path(__file__).resolve().parent / "results"
SLOWER, USAGE, DAMAGED, MISSING = 1, 2, 65, 66
LABEL = "projection, not measured"
# float32 rows need float32's accuracy, which the tensor cores' tf32 does not reach.
_UNITS = {"bfloat16": "bf16_tflops", "float16": "bf16_tflops", "float32": "fp32_tflops"}
# Settings that may explain a difference between two runs of one device.
_SETTINGS = ("threads", "cpu_capability", "python")


class NotComparable(Exception):
    """The runs cannot be compared, or nothing can be projected from them."""


def say(text: str = "") -> None:
    """Prints a line of the report."""
    sys.stdout.write(text + "\n")


def _draw(results: Sequence[Results]) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        say("no plots: matplotlib is not installed (pip install 'dragkit[bench]')")
        return
    from bench.plots import roofline

    for result in results:
        path, absent = roofline(result)
        if path is None:
            continue
        say(f"plot: {path}")
        if absent:
            say(f"not on the roofline, bytes or operations are not counted: {'; '.join(absent)}")


def report(paths: Sequence[Path], *, draw: bool) -> None:
    """Prints every table, and draws the plots if `draw`."""
    results = read_all(paths)
    for result in results:
        say(f"## {result.theme}\n")
        for comparison in result.comparisons:
            say(comparison.markdown(describe(result.machine)))
    if draw:
        _draw(results)


def rows_by_name(results: Sequence[Results]) -> dict[str, Timing]:
    """Every contender of every comparison. A name that occurs again is numbered."""
    rows: dict[str, Timing] = {}
    occurrences: Counter[str] = Counter()
    for result in results:
        for comparison in result.comparisons:
            for timing in comparison.timings:
                name = f"{result.theme}: {_title(comparison)}: {timing.name}"
                occurrences[name] += 1
                number = occurrences[name]
                rows[name if number == 1 else f"{name} (no. {number})"] = timing
    return rows


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
        versions = packages if isinstance(packages, dict) else {}
        known = {key: machine.get(key) for key in _SETTINGS} | versions
        settings.append({key: value for key, value in known.items() if value is not None})
    one, other = settings
    return [
        f"note: {key} differs: {value} and {other[key]}"
        for key, value in one.items()
        if key in other and value != other[key]
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
        threshold: 0.1 lets a row take up to 1.1 times as long. Peers are listed and never judged,
            because they show whether the machine was as fast.

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
    a, b = rows_by_name(first), rows_by_name(second)
    lines = [f"device {devices[0]}", *_notes(first[0].machine, second[0].machine), ""]
    lines += ["| row | first ms | second ms | second / first | |", "|---|---:|---:|---:|---|"]
    peers, slower = [], []
    for name in (name for name in a if name in b):
        before, after = a[name].ms, b[name].ms
        if before is None or after is None:
            continue
        ratio, verdict = after[0] / before[0], ""
        if a[name].peer:
            verdict = "peer"
            peers.append(ratio)
        elif ratio > 1 + threshold:
            verdict = "SLOWER"
            slower.append(name)
        elif ratio < 1 / (1 + threshold):
            verdict = "faster"
        lines.append(f"| {name} | {before[0]:.4g} | {after[0]:.4g} | {ratio:.3f} | {verdict} |")
    lines += ["", *_only_in(a, b, "first"), *_only_in(b, a, "second")]
    if peers:
        lines.append(f"peers: median ratio {statistics.median(peers):.3f} of {len(peers)} rows")
    lines.append(f"{len(slower)} of our rows slower by more than {threshold:.0%}")
    return lines, slower


def ceiling(spec: CardSpec, num_bytes: float, flops: float, dtype: str) -> tuple[float, str]:
    """The least ms by a data sheet, and what limits them: "memory" or "arithmetic"."""
    memory = num_bytes / (spec.memory_gb_per_s * 1e6)
    arithmetic = flops / (getattr(spec, _UNITS[dtype]) * 1e9)
    return (memory, "memory") if memory >= arithmetic else (arithmetic, "arithmetic")


def _projected(result: Results, name: str, target: CardSpec) -> Iterator[str]:
    """A line for every row: its time on `target` if it reaches the same fraction of the ceiling.

    Both ceilings are those of data sheets. A copy reaches less than the data sheet says on either
    device, so a fraction of a measured copy would be too large for the target's data sheet.
    """
    gpu = result.machine.get("gpu")
    if not isinstance(gpu, str):
        device = result.machine["device"]
        raise NotComparable(f"{result.path}: was measured on {device}, which is no GPU")
    if (measured := card_spec(gpu)) is None:
        raise NotComparable(f"{result.path}: the peak rates of {gpu} are not known")
    for comparison in result.comparisons:
        title, dtype = _title(comparison), str(comparison.about.get("dtype"))
        if comparison.bytes is None or comparison.flops is None or dtype not in _UNITS:
            yield f"{title}: refused, its bytes and operations are not counted"
            continue
        work = (comparison.bytes, comparison.flops, dtype)
        (ms, limit), (target_ms, target_limit) = ceiling(measured, *work), ceiling(target, *work)
        for row in comparison.timed:
            fraction = ms / row.ms[0]
            yield (
                f"{title}: {row.name}: {target_ms / fraction:.4g} ms on {name} by {target_limit} "
                f"({gpu}: {row.ms[0]:.4g} ms, {fraction:.1%} of its {limit} ceiling)"
            )


def project(results: Sequence[Results], target: str) -> list[str]:
    """Times that measured kernels might take on another GPU, by arithmetic on data sheets.

    Args:
        results: of a GPU whose peak rates are known.
        target: a GPU, such as "b200".

    Raises:
        NotComparable: the target is unknown, the rows are of a CPU, or there are no rows.
    """
    name = target.upper()
    if (spec := card_spec(name)) is None:
        raise NotComparable(f"the peak rates of {target} are not known")
    rows = [line for result in results for line in _projected(result, name, spec)]
    if not rows:
        raise NotComparable("there are no rows of kernel benchmarks")
    lines = [
        f"{name}: {spec.memory_gb_per_s / 1e3:g} TB/s, {spec.bf16_tflops:,g} TFLOP/s dense "
        "bfloat16, by its data sheet; each row reaches the same fraction of its ceiling as where "
        "it was measured",
        "a small fraction means that launches or latency limit the row, and those do not shrink "
        "with a peak rate",
    ]
    return [f"{LABEL}: {line}" for line in [*lines, *rows]]


def _compare_folders(folders: Sequence[Path], threshold: float) -> int:
    lines, slower = compare(*(read_all([path]) for path in folders), threshold)
    say("\n".join(lines))
    return SLOWER if slower else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--no-plots", action="store_true", help="print tables only")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    group.add_argument("--project", metavar="GPU", help="target of the projection, such as b200")
    parser.add_argument(
        "--threshold", type=float, default=0.1, help="0.1 lets a row take 1.1 times as long"
    )
    args = parser.parse_args(arguments)
    if args.compare and args.folders:
        parser.error("--compare takes two folders and no others")
    if not 0 <= args.threshold < float("inf"):
        parser.error(f"--threshold {args.threshold}: a number of at least 0 is needed, such as 0.1")
    folders = args.folders or [_RESULTS]
    try:
        if args.compare:
            return _compare_folders(args.compare, args.threshold)
        if args.project:
            say("\n".join(project(read_all(folders), args.project)))
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
