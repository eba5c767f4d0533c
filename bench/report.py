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
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.reading import Profile, ResultError, Results, read_all
from bench.tables import describe

_HERE = Path(__file__).resolve().parent / "results"
SLOWER, USAGE, DAMAGED, MISSING = 1, 2, 65, 66


def say(text: str = "") -> None:
    """A line of the report."""
    sys.stdout.write(text + "\n")


def profile_table(profile: Profile) -> str:
    """Milliseconds per step of every range, one column for each trace."""
    traces = list(profile.ranges)
    names = sorted({name for ranges in profile.ranges.values() for name in ranges})
    lines = [
        "### a training step by its parts",
        "",
        describe(profile.machine),
        "",
        f"| range, ms per step of {profile.steps} | {' | '.join(traces)} |",
        f"|---|{'---:|' * len(traces)}",
    ]
    for name in names:
        cells = []
        for trace in traces:
            ms = profile.ranges[trace].get(name)
            cells.append("" if ms is None else f"{ms / profile.steps:.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _plots(results: Sequence[Results], profiles: Sequence[Profile]) -> None:
    from bench import plots

    for result in results:
        path, absent = plots.roofline(result)
        for made in (path, plots.throughput(result)):
            if made is not None:
                say(f"plot: {made}")
        if path is not None and absent:
            say(f"not on the roofline, bytes or operations are not counted: {'; '.join(absent)}")
    for profile in profiles:
        if (made := plots.step_parts(profile)) is not None:
            say(f"plot: {made}")


def report(paths: Sequence[Path], *, draw: bool) -> int:
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
        _plots(results, profiles)
    return 0


def compare(first: Path, second: Path, threshold: float) -> int:
    """Prints the ratios; 1 if one of our rows is too slow."""
    from bench.regressions import DifferentDevices, compare_runs

    runs = []
    for path in (first, second):
        results, _ = read_all([path])
        if not results:
            raise ResultError(path, "holds no timings", missing=True)
        runs.append(results)
    try:
        found = compare_runs(*runs, threshold=threshold)
    except DifferentDevices as error:
        sys.stderr.write(f"bench.report: {error}\n")
        return USAGE
    say("\n".join(found.lines))
    return SLOWER if found.regressions else 0


def project(paths: Sequence[Path], target: str) -> int:
    """Prints the projection."""
    from bench.projection import NoProjection, projection

    results, _ = read_all(paths)
    try:
        say("\n".join(projection(results, target)))
    except NoProjection as error:
        sys.stderr.write(f"bench.report: no projection: {error}\n")
        return USAGE
    return 0


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
    folders = args.folders or [_HERE]
    try:
        if args.compare:
            return compare(*args.compare, args.threshold)
        if args.project:
            return project(folders, args.project)
        return report(folders, draw=not args.no_plots)
    except ResultError as error:
        sys.stderr.write(f"bench.report: {error}\n")
        return MISSING if error.missing else DAMAGED


if __name__ == "__main__":
    raise SystemExit(main())
