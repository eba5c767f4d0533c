"""Makes docs/results.md from runs on the demo and on published sets with several seeds.

    python scripts/results.py [--seeds 0 1 2] [--sets demo webqsp ...] [--jobs 2]

Every table comes from two `python -m dragkit.train` commands, which the document shows. The second
one's `results.json` has the test metrics of each stage. Published sets are read from DRAGKIT_DATA,
or from ../shared/data beside the repository. Sections of sets that are not chosen stay unchanged.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METRICS = ("strict-hits@1", "strict-f1", "rog-hit", "retrieval-recall", "answer-recall@10")
# One epoch of a set of 5,000 questions is enough to learn.
EPOCHS = {("pathquestion", 2): 1}
SETS = ("demo", "worldcup", "pathquestion", "webqsp", "cwq", "freebase_simple")

HEAD = """# Results

Test metrics of the tiny preset (a retriever of width 64 to 128 and the bundled 0.4 M parameter
Nemotron-H), mean and standard deviation over seeds, in percent. The stages of every run:

- **untrained**: a freshly initialised retriever picks the facts, the bundled generator answers from
  their text.
- **after phase 1 (cascade)**: the retriever has learned from shortest-path labels; the generator is
  still untouched and sees text alone.
- **after phase 2 (joint)**: retriever, projector and LoRA adapters trained together, structural
  vectors in the prompt.

`strict-hits@1`: the first generated answer equals a gold answer. `strict-f1`: F1 of the answer
sets, one-to-one. `rog-hit`: some gold answer occurs anywhere in the output. All test questions are
in the denominator, also those whose answer is not in their subgraph. The published sets are small
reconstructions with about 50 facts a question: the figures say that training works, and are not
comparable with published ones. `python scripts/results.py` makes this page.

Training amplifies the last bits of rounding: with the same seed, another machine or number of
threads moves a run by some points in either direction, by more where the copying of answers is
learned late.
"""


def command(name: str, phase: int, seed: int, folder: str, data: str) -> list[str]:
    """The arguments of `python -m dragkit.train` for one phase of a run."""
    parts = ["--phase", str(phase), "--preset", "tiny", "--seed", str(seed)]
    parts += ["--checkpoint_dir", f"{folder}/phase{phase}"]
    if phase == 2:
        parts += ["--phase1_checkpoint", f"{folder}/phase1", "--generator_model", "tiny"]
    if (name, phase) in EPOCHS:
        parts += ["--epochs", str(EPOCHS[name, phase])]
    if name != "demo":
        parts += ["--heuristics_path", f"{data}/{name}.train.jsonl.gz"]
        parts += ["--val_heuristics_path", f"{data}/{name}.dev.jsonl.gz"]
        parts += ["--set", f"data.test_heuristics_path={data}/{name}.test.jsonl.gz"]
    return parts


def train(name: str, seed: int, runs: Path, threads: int, phases: list[int]) -> dict | None:
    """The results of one run, or None if it failed. A phase that has results is not repeated."""
    folder = runs / f"{name}-{seed}"
    for phase in phases:
        result = folder / f"phase{phase}" / "results.json"
        last = {1: "after phase 1", 2: "after phase 2 (joint)"}[phase]
        if result.is_file() and last in json.loads(result.read_text()):
            continue
        data = os.environ.get("DRAGKIT_DATA", str(ROOT.parent / "shared" / "data"))
        arguments = command(name, phase, seed, str(folder), data)
        arguments += ["--set", f"run.num_threads={threads}"]
        start = time.time()
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"phase{phase}.log").open("w") as log:
            code = subprocess.run(
                [sys.executable, "-m", "dragkit.train", *arguments],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                stdout=log,
                stderr=log,
                check=False,
            ).returncode
        seconds = time.time() - start
        sys.stdout.write(f"{name} seed {seed} phase {phase}: exit {code} after {seconds:.0f} s\n")
        sys.stdout.flush()
        if code:
            return None
    result = folder / "phase2" / "results.json"
    return json.loads(result.read_text()) if result.is_file() else None


def cell(values: list[float]) -> str:
    """Mean and standard deviation over seeds, in percent."""
    if not values:
        return "-"
    mean = 100 * statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}"


def table(name: str, results: list[dict], provenance: str) -> str:
    """The section of one set, with stages as rows."""
    asked = results[0]["untrained"]["counts"]["asked"]
    lines = [f"## {name}", "", f"{asked} test questions, {len(results)} seeds. {provenance}", ""]
    lines += ["| stage | " + " | ".join(METRICS) + " |", "| --- |" + " ---: |" * len(METRICS)]
    for stage in results[0]:
        cells = []
        for metric in METRICS:
            rows = [r[stage]["metrics"] for r in results]
            cells.append(cell([r[metric]["mean"] for r in rows if metric in r]))
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    lines += ["", "```"]
    for phase in (1, 2):
        shown = " ".join(command(name, phase, 0, f"runs/{name}-0", "$DRAGKIT_DATA"))
        lines.append(f"python -m dragkit.train {shown}")
    return "\n".join([*lines, "```", ""])


def provenance() -> str:
    """Date, commit, versions and machine of the runs."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return (
        f"Made on {time.strftime('%Y-%m-%d')} at commit {commit} with Python "
        f"{platform.python_version()}, torch {version('torch')}, transformers "
        f"{version('transformers')}, on a CPU ({os.cpu_count()} cores)."
    )


def sections(document: Path) -> dict[str, str]:
    """The sections of the present document, by set."""
    if not document.is_file():
        return {}
    _, *parts = document.read_text(encoding="utf-8").split("\n## ")
    return {part.split("\n", 1)[0]: f"## {part.rstrip()}\n" for part in parts}


def main() -> None:
    """Trains the runs without results and writes the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--sets", nargs="+", default=list(SETS), choices=SETS)
    add("--jobs", type=int, default=2, help="runs at the same time")
    add("--phases", type=int, nargs="+", default=[1, 2], help="phases to train")
    add("--runs", type=Path, default=ROOT / "runs" / "results", help="folder of the checkpoints")
    add("--output", type=Path, default=ROOT / "docs" / "results.md", help="the document")
    args = parser.parse_args()
    # More threads than cores would slow down every run.
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    runs = [(name, seed) for name in args.sets for seed in args.seeds]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda run: train(*run, args.runs, threads, args.phases), runs))
    if 2 not in args.phases:
        return
    by_set: dict[str, list[dict]] = {}
    for (name, _), result in zip(runs, results, strict=True):
        if result is not None:
            by_set.setdefault(name, []).append(result)
    document, source = sections(args.output), provenance()
    document |= {name: table(name, rows, source) for name, rows in by_set.items()}
    lines = [HEAD, *(document[name] for name in SETS if name in document)]
    args.output.write_text("\n".join(lines), encoding="utf-8")
    if None in results:
        raise SystemExit(f"some runs failed; their logs are {args.runs}/*/phase*.log")


if __name__ == "__main__":
    main()
