"""The parts of the device suite that are neither tests nor benchmarks.

python scripts/device_parts.py env OUT [MISSING ...]
python scripts/device_parts.py profile OUT WORK [--cpu]
python scripts/device_parts.py questions FILE
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_PHASE1 = {"copy", "retriever", "backward", "optimizer"}
_PHASE2 = _PHASE1 | {"sampler", "prompt", "generator"}
# Names of the kernels of dragkit_kernels.
_OURS = re.compile(r"_[a-z_]+_kernel")
_SMI = ("name", "driver_version", "pstate", "power.draw", "power.limit", "temperature.gpu")
_SMI += ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "memory.total")
_TOP = 40
_COMMAND = "scripts/device_suite.sh"


def environment(out: Path, missing: Sequence[str]) -> int:
    """Writes env.json: the machine, the missing modules and the output of nvidia-smi."""
    from bench.records import machine_info

    query = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        smi = dict(zip(_SMI, run.stdout.split("\n")[0].split(", "), strict=False))
    except (OSError, subprocess.SubprocessError) as error:
        smi = {"error": str(error)}
    info = {"machine": machine_info(_COMMAND), "missing": missing, "nvidia_smi": smi}
    (out / "env.json").write_text(json.dumps(info, indent=1) + "\n")
    return 0


def write_questions(path: Path, count: int) -> None:
    """Writes the first questions of the bundled demo."""
    from dragkit.demo import demo_files

    lines = Path(demo_files().train).read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:count]), encoding="utf-8")


def profile(out: Path, work: Path, *, cpu: bool) -> int:
    """Trains on a few demo questions, saves the traces, and checks that they are complete.

    Returns:
        1 if a command failed or a trace lacks a range or kernel, else 0.
    """
    from bench.records import machine_info

    batch, steps = (4, "1:4") if cpu else (16, "10:13")
    questions = work / "questions.jsonl"
    write_questions(questions, 4 * batch)
    common = ["--preset", "tiny", "--generator_model", "tiny", "--heuristics_path", str(questions)]
    common += ["--profile_steps", steps, "--batch_size", str(batch)]
    common += ["--epochs", "1" if cpu else "4", "--set", "run.profile_trace=true"]
    common += ["--set", "run.compile=false", "--set", f"run.device={'cpu' if cpu else 'cuda'}"]
    common += [] if cpu else ["--set", "retriever.hidden_dim=256"]
    # Phase 2 without a checkpoint trains phase 1 first, in a folder inside its folder. CUDA graphs
    # hide the ranges inside a step, so this command runs without them.
    joint = work / "joint"
    commands = [(2, joint, ["--set", "run.cuda_graphs=false"])]
    traces = [("phase1", joint / "phase1", _PHASE1), ("phase2", joint, _PHASE2)]
    if not cpu:
        commands.append((1, work / "graphs", []))
        traces.append(("phase1_graphs", work / "graphs", {"copy", "replay", "optimizer"}))
    problems: list[str] = []
    for phase, folder, settings in commands:
        arguments = ["--phase", str(phase), *common, "--checkpoint_dir", str(folder), *settings]
        command = [sys.executable, "-m", "dragkit.train", *arguments]
        if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
            problems.append(f"{folder.name}: exit code {code}")
    summaries = {}
    for name, folder, ranges in traces:
        trace = folder / f"trace-{steps.replace(':', '-')}.json.gz"
        if not trace.is_file():
            problems.append(f"{name}: no trace")
            continue
        (out / f"trace_{name}.json.gz").write_bytes(trace.read_bytes())
        summaries[name] = summarise(trace)
        problems += [f"{name}: {text}" for text in gaps(summaries[name], ranges, cpu=cpu)]
    content = {"machine": machine_info(_COMMAND), "steps": steps}
    content |= {"problems": problems, "traces": summaries}
    (out / "profile.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / "profile.md").write_text(range_table(summaries, steps))
    sys.stderr.writelines(f"{problem}\n" for problem in problems)
    return int(bool(problems))


def summarise(trace: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Calls and milliseconds by name, of our ranges and of the kernels that took longest."""
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    ranges, kernels = defaultdict(list), defaultdict(list)
    rows = {"user_annotation": ranges, "kernel": kernels}
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in rows:
            rows[event["cat"]][event["name"]].append(event["dur"] / 1e3)
    ours = [ms for name, times in kernels.items() if _OURS.match(name) for ms in times]
    total = [ms for times in kernels.values() for ms in times]
    return {
        "ranges": _longest(ranges),
        "kernels": _longest(kernels),
        "all_kernels": _longest({"all": total, "dragkit": ours}),
    }


def range_table(summaries: dict[str, dict], steps: str) -> str:
    """Milliseconds per step of every range, one column for each trace."""
    begin, end = map(int, steps.split(":"))
    lines = [f"| range, ms per step of {end - begin} | {' | '.join(summaries)} |"]
    lines.append(f"|---|{'---:|' * len(summaries)}")
    for name in sorted({name for summary in summaries.values() for name in summary["ranges"]}):
        rows = (summary["ranges"].get(name) for summary in summaries.values())
        cells = ("" if row is None else f"{row['ms'] / (end - begin):.3f}" for row in rows)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _longest(rows: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    ordered = sorted(rows.items(), key=lambda row: -sum(row[1]))[:_TOP]
    return {name: {"calls": len(ms), "ms": round(sum(ms), 4)} for name, ms in ordered}


def gaps(summary: dict, ranges: set[str], *, cpu: bool) -> Iterator[str]:
    """The expected ranges and kernels that a trace does not hold."""
    yield from (f"no range {name}" for name in sorted(ranges - set(summary["ranges"])))
    if not cpu and not summary["all_kernels"]["dragkit"]["calls"]:
        yield "no kernel of dragkit ran on the device"


def main(arguments: Sequence[str]) -> int:
    """Runs one part. Returns the exit code."""
    name, out, *rest = arguments
    if name == "questions":
        write_questions(Path(out), 48)
        return 0
    if name == "env":
        return environment(Path(out), rest)
    if name == "profile":
        return profile(Path(out), Path(rest[0]), cpu="--cpu" in rest)
    raise SystemExit(f"unknown part {name}; choose env, profile or questions")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
