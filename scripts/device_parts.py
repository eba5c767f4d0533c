"""The parts of the device suite that are neither tests nor benchmarks.

python scripts/device_parts.py env OUT [MISSING ...]
python scripts/device_parts.py profile OUT WORK [--cpu]
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_STEP = {"copy", "backward", "optimizer"}
# The kernels of dragkit_kernels by their names.
_OURS = re.compile(r"_[a-z_]+_kernel")
_SMI = ("name", "driver_version", "pstate", "power.draw", "power.limit", "temperature.gpu")
_SMI += ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "memory.total")
_TOP = 40
_COMMAND = "scripts/device_suite.sh"


def environment(out: Path, missing: Sequence[str]) -> int:
    """Writes env.json."""
    import torch

    from bench.records import machine_info
    from dragkit.observe.gpu import GpuMonitor

    info: dict[str, object] = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "missing": missing}
    info["machine"] = machine_info(_COMMAND)
    info["torch"] = {"version": torch.__version__, "cuda": torch.version.cuda}
    try:
        import triton

        info["triton"] = triton.__version__
    except ImportError:
        info["triton"] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        info["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
        if (monitor := GpuMonitor.open()) is not None and (reading := monitor.read()) is not None:
            info["reading"] = asdict(reading)
    info["nvidia_smi"] = _nvidia_smi()
    (out / "env.json").write_text(json.dumps(info, indent=1) + "\n")
    return 0


def _nvidia_smi() -> dict[str, str] | None:
    """Driver, power and clocks, where the tool is there."""
    query = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    values = found.stdout.strip().split("\n")[0].split(", ")
    return dict(zip(_SMI, values, strict=False))


@dataclass(frozen=True, slots=True)
class Profiled:
    """One profiled training command.

    Attributes:
        name: of its folder; phase: 1 or 2; settings: besides the common ones.
        traces: name, folder below the run's, and the ranges that the trace must hold.
    """

    name: str
    phase: int
    settings: tuple[str, ...]
    traces: tuple[tuple[str, str, frozenset[str]], ...]


def commands(*, cpu: bool) -> list[Profiled]:
    """Both phases, range by range; on a GPU also phase 1 as CUDA graphs."""
    alone = frozenset(_STEP | {"retriever"})
    joint = alone | {"sampler", "prompt", "generator"}
    # Phase 2 without a checkpoint trains phase 1 first, in a folder of its own.
    both = (("phase1", "phase1", alone), ("phase2", ".", joint))
    found = [Profiled("joint", 2, ("run.cuda_graphs=false",), both)]
    if not cpu:
        replayed = frozenset({"copy", "replay", "optimizer"})
        found.append(Profiled("graphs", 1, (), (("phase1_graphs", ".", replayed),)))
    return found


def write_questions(path: Path, count: int) -> None:
    """The first questions of the bundled demo."""
    from dragkit.demo import demo_files

    lines = Path(demo_files().train).read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:count]), encoding="utf-8")


def profile(out: Path, work: Path, *, cpu: bool) -> int:
    """Trains on a few demo questions, keeps the traces, and looks for names in them."""
    from bench.records import machine_info

    batch, steps = (4, "1:4") if cpu else (16, "10:13")
    questions = work / "questions.jsonl"
    write_questions(questions, 4 * batch)
    common = ["--preset", "tiny", "--generator_model", "tiny", "--heuristics_path", str(questions)]
    common += ["--profile_steps", steps, "--batch_size", str(batch)]
    common += ["--epochs", "1" if cpu else "4"]
    settings = ["run.profile_trace=true", "run.compile=false"]
    settings += ["run.device=cpu"] if cpu else ["retriever.hidden_dim=256", "run.device=cuda"]
    report: dict[str, object] = {}
    problems: list[str] = []
    for asked in commands(cpu=cpu):
        folder = work / asked.name
        arguments = ["-m", "dragkit.train", "--phase", str(asked.phase), *common]
        arguments += ["--checkpoint_dir", str(folder)]
        for setting in (*settings, *asked.settings):
            arguments += ["--set", setting]
        code = subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False).returncode
        if code:
            problems.append(f"{asked.name}: exit code {code}")
        for name, below, ranges in asked.traces:
            trace = folder / below / f"trace-{steps.replace(':', '-')}.json.gz"
            if not trace.is_file():
                problems.append(f"{name}: no trace")
                continue
            (out / f"trace_{name}.json.gz").write_bytes(trace.read_bytes())
            report[name] = found = summarise(trace)
            problems += [f"{name}: {text}" for text in lacking(found, ranges, cpu=cpu)]
    content = {
        "machine": machine_info(_COMMAND),
        "steps": steps,
        "problems": problems,
        "traces": report,
    }
    (out / "profile.json").write_text(json.dumps(content, indent=1) + "\n")
    for problem in problems:
        sys.stderr.write(problem + "\n")
    return int(bool(problems))


def summarise(trace: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Calls and milliseconds by name: our ranges, and the device's kernels that took longest."""
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    kinds = {"user_annotation": "ranges", "kernel": "kernels"}
    sums: dict[str, dict[str, list[float]]] = {kind: defaultdict(list) for kind in kinds.values()}
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in kinds:
            sums[kinds[event["cat"]]][event["name"]].append(event["dur"] / 1e3)
    found = {}
    for kind, rows in sums.items():
        ordered = sorted(rows.items(), key=lambda row: -sum(row[1]))
        found[kind] = {n: {"calls": len(v), "ms": round(sum(v), 4)} for n, v in ordered[:_TOP]}
        if kind == "kernels":
            found["all_kernels"] = {"all": _total(rows), "dragkit": _total(rows, _OURS)}
    return found


def _total(rows: dict[str, list[float]], pattern: re.Pattern | None = None) -> dict[str, float]:
    """Calls and milliseconds of the names that match."""
    taken = [x for name, v in rows.items() if pattern is None or pattern.match(name) for x in v]
    return {"calls": len(taken), "ms": round(sum(taken), 4)}


def lacking(found: dict, ranges: frozenset[str], *, cpu: bool) -> list[str]:
    """What a trace should hold and does not."""
    problems = [f"no range {name}" for name in sorted(ranges - set(found["ranges"]))]
    if not cpu and not found["all_kernels"]["dragkit"]["calls"]:
        problems.append("no kernel of dragkit ran on the device")
    return problems


def main(arguments: Sequence[str]) -> int:
    """Runs one part; returns the exit code."""
    name, out, *rest = arguments
    if name == "questions":
        write_questions(Path(out), 48)
        return 0
    if name == "env":
        return environment(Path(out), rest)
    if name == "profile":
        return profile(Path(out), Path(rest[0]), cpu="--cpu" in rest)
    raise SystemExit(f"unknown part {name}")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
