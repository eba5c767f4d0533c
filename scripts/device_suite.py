"""Tests, benchmarks and profiles of this tree on the GPU of this machine, by one command.

    scripts/device_suite.sh [--parts PART,PART] [--cpu] [OUT]

The parts are env, tests, kernels, train_step, mamba, decode, profile and report. They run in this
order, the most valuable first; the report makes tables and plots of the others. One more runs when
it is named: generator, the joint step of the whole 30B with random weights, which takes a card of
80 GB or more and minutes of its own. Each has a time limit, and one that fails stops no other. OUT
(default: bench/results/<device>/) gets their results and `summary.json`. With `--cpu` the same
parts run at their smallest, without a GPU. The exit code is 0 if no part failed.

This file says what runs, `device_runner.py` how. Both use the standard library only: what is
missing on a bare machine is named, and what does not need it runs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from device_runner import ROOT, Part, Runner, hear_interrupts, say

# Seconds of each part.
LIMITS = {
    "env": 40,
    "tests": 240,
    "kernels": 120,
    "train_step": 120,
    "mamba": 60,
    "decode": 90,
    "profile": 100,
    "generator": 400,
    "report": 30,
}
# Parts that run only when they are named.
ALONE = ("generator",)
# Exit codes of pytest.
NO_TESTS, NOT_COLLECTED = 5, (2, 4)


class Suite(Runner):
    """The parts of the suite."""

    limits = LIMITS

    def env(self, part: Part, end: float) -> None:
        """Device, driver, versions, clocks."""
        arguments = ["scripts/device_parts.py", "env", str(self.out), *self.missing]
        self.call(part, arguments, self.out / "env.log", end)

    def tests(self, part: Part, end: float) -> None:
        """One process a file: a kernel that breaks the device's context breaks its file alone."""
        files = ["tests/triton_ops/test_triton_math.py"]
        variables = {"TRITON_INTERPRET": "1"}
        if not self.cpu:
            files, variables = gpu_test_files(), {}
        folder = self.work / "tests"
        folder.mkdir()

        def run(file: str) -> tuple[Part, Path]:
            one, stem = Part(file), file.replace("/", ".").removesuffix(".py")
            arguments = ["-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
            arguments += ["-m", "gpu", "--junitxml", str(folder / f"{stem}.xml"), file]
            log = folder / f"{stem}.log"
            self.call(one, arguments, log, end, **variables)
            return one, log

        # Most of the time goes into compiling kernels, on the host.
        workers = max(1, min(6, (os.cpu_count() or 2) // 2))
        with ThreadPoolExecutor(workers) as pool:
            results = list(pool.map(run, files))
        with (self.out / "gpu_tests.log").open("w") as file:
            for one, log in results:
                file.write(f"===== {one.name}\n{log.read_text(errors='replace')}\n")
        for one, log in results:
            part.commands += one.commands
            why = "".join(f", {note}" for note in one.notes)
            if one.exit_code == NO_TESTS:
                part.notes.append(f"no tests: {one.name}")
            elif one.exit_code in NOT_COLLECTED and self.lacking(log):
                part.notes.append(f"left out: {one.name}{why}")
            elif one.exit_code:
                part.exit_code = part.exit_code or one.exit_code
                part.notes.append(f"failed: {one.name} (exit code {one.exit_code}{why})")
        part.tests = merge_reports(sorted(folder.glob("*.xml")), self.out / "gpu_tests.xml")

    def kernels(self, part: Part, end: float) -> None:
        """The layers and the whole step; all ops and compiled opponents take more than an hour."""
        chosen = ["--no-bench-compiled", "-k", "layer or retriever_step"]
        if self.cpu:
            chosen = ["-k", "segment_softmax and forward"]
        self.bench(part, end, "kernels", chosen)

    def train_step(self, part: Part, end: float) -> None:
        """Phase 1's step against packed PyG, and phase 2's rates.

        Compiled ways come in a run of their own, as that may fail.
        """
        if self.cpu:
            folder = self.work / "few_questions"
            maker = ["scripts/device_parts.py", "questions", str(folder / "webqsp.train.jsonl")]
            folder.mkdir()
            self.call(part, maker, self.out / "train_step.log", end)
            chosen = ["-k", "packed_pyg and 50"]
            self.bench(part, end, "train_step", chosen, DRAGKIT_DATA=str(folder))
            return
        self.bench(part, end, "train_step", ["-k", "packed_pyg or phase2_rates"])
        small = ["-k", "packed_pyg and 50", "--bench-compiled"]
        self.bench(part, end, "train_step", small, suffix="_compiled")

    def mamba(self, part: Part, end: float) -> None:
        """The packed scan and a layer of the 30B against the library's."""
        self.bench(part, end, "mamba", ["-k", "tiny"] if self.cpu else [])

    def decode(self, part: Part, end: float) -> None:
        """Greedy decoding with the cache and without."""
        self.bench(part, end, "decode", ["--bench-prompts", "4"] if self.cpu else [])

    def generator(self, part: Part, end: float) -> None:
        """The generator's part of a joint step of the 30B; without a GPU of a small one."""
        self.bench(part, end, "generator", ["--bench-full"])

    def bench(
        self,
        part: Part,
        end: float,
        theme: str,
        chosen: Sequence[str],
        suffix: str = "",
        **variables: str,
    ) -> None:
        """Runs one file of benchmarks and moves its tables to OUT."""
        file = f"bench/bench_{theme}.py"
        if not (ROOT / file).is_file():
            part.notes.append(f"left out: there is no {file}")
            return
        if "pytest_benchmark" in self.missing:
            part.notes.append("needs pytest_benchmark")
        folder = self.work / f"{theme}{suffix}"
        arguments = ["-m", "pytest", file, "--benchmark-only", "-v", "--tb=short", "-rfE"]
        arguments += ["-p", "no:cacheprovider", "--results", str(folder), *chosen]
        arguments += ["--bench-repeats", "2"] if self.cpu else []
        self.call(part, arguments, self.out / f"{theme}{suffix}.log", end, **variables)
        for made in folder.glob("*/*"):
            shutil.copy(made, self.out / f"{made.stem}{suffix}{made.suffix}")

    def profile(self, part: Part, end: float) -> None:
        """Chrome traces of a few steps, and what lies in them."""
        arguments = ["scripts/device_parts.py", "profile", str(self.out), str(self.work)]
        arguments += ["--cpu"] if self.cpu else []
        self.call(part, arguments, self.out / "profile.log", end)

    def report(self, part: Part, end: float) -> None:
        """Tables and plots of what the other parts have measured, out of time or not."""
        self.end = max(self.end, end)
        self.call(part, ["-m", "bench.report", str(self.out)], self.out / "report.md", end)


def gpu_test_files() -> list[str]:
    """Test files of the `gpu` tier: those of kernels, and those that say so."""
    # A test of an op that asks for the fixture `backend` runs its kernels as well.
    signs = ("mark.gpu", "mark.triton", "backend: str")
    found = [
        file
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        if file.parent.name == "triton_ops"
        or any(sign in file.read_text(encoding="utf-8") for sign in signs)
    ]
    return [str(file.relative_to(ROOT)) for file in found]


def merge_reports(reports: Sequence[Path], target: Path) -> dict[str, int]:
    """One JUnit file of all reports; returns the sums of tests, failures, errors and skipped."""
    root, sums = ET.Element("testsuites"), dict.fromkeys(("tests", "failures", "errors"), 0)
    sums["skipped"] = 0
    for report in reports:
        try:
            suites = list(ET.parse(report).getroot().iter("testsuite"))
        except ET.ParseError:  # cut off; the log has what there is
            continue
        for suite in suites:
            suite.set("name", report.stem)
            root.append(suite)
            for key in sums:
                sums[key] += int(suite.get(key, 0))
    ET.ElementTree(root).write(target, encoding="utf-8", xml_declaration=True)
    return sums


def default_folder(work: Path, *, cpu: bool) -> Path:
    """bench/results/<device>; without a GPU a new folder, since its figures are worth nothing."""
    if cpu:
        return Path(tempfile.mkdtemp(prefix="device-suite-"))
    code = "from bench.records import device_name; print(device_name())"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return ROOT / "bench" / "results" / (found.stdout.strip() or "unknown-device")


def main() -> int:
    """Runs the parts that are asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, help="folder of the results")
    usual = ",".join(name for name in LIMITS if name not in ALONE)
    parser.add_argument("--parts", default=usual, help="some of them, with commas")
    parser.add_argument("--cpu", action="store_true", help="smallest sizes, without a GPU")
    args = parser.parse_args()
    names = args.parts.split(",")
    if unknown := [name for name in names if name not in LIMITS]:
        parser.error(f"unknown parts {', '.join(unknown)}; there are {', '.join(LIMITS)}")
    hear_interrupts()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        out = (args.out or default_folder(work, cpu=args.cpu)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        say(f"results: {out}")
        parts = Suite(out, work, cpu=args.cpu).run(names)
    failed = [part.name for part in parts if part.exit_code]
    say(f"failed: {', '.join(failed)}" if failed else "all parts done")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
