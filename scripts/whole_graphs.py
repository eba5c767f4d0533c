"""Makes docs/whole_graphs.md: how many gold facts are among the first k, before and after training.

    python scripts/whole_graphs.py [--facts 2000] [--epochs 20] [--output docs/whole_graphs.md]

The questions of the published sets lose their subgraphs, and get new ones from the whole knowledge
base. Phase 1 trains on them. Sets are read from DRAGKIT_DATA. Finished builds and runs in the
work folder are not repeated.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dragkit.data.build.building import build
from dragkit.data.build.cut import CutOptions, Cutter
from dragkit.data.build.graph import Graph, find_name
from dragkit.data.build.graph_store import open_graph
from dragkit.data.build.parts import BuildFolder
from dragkit.data.build.settings import BuildSettings
from dragkit.data.cache import cache_root
from dragkit.data.evidence import RELATION_PATH, fact_relevance
from dragkit.data.question_file import Question, read_questions
from dragkit.trainer.evaluate_run import load_run

ROOT = Path(__file__).resolve().parents[1]
KEPT = (10, 50, 500, 2000)
KEYS = ("id", "question", "answer", "topic_entities", "relation_paths", "group")
# Knowledge base -> the sets whose questions are about it.
REBUILT = {
    "metaqa": ("metaqa", "metaqa_large"),
    "freebase_pool": ("webqsp", "cwq", "freebase_simple", "webqsp_cwq_large"),
}
# Set -> knowledge base and the files whose questions are taken for training.
SETS = {
    "MetaQA": ("metaqa", "metaqa_large.{}.jsonl.gz"),
    "WebQSP and CWQ": ("freebase_pool", "webqsp_cwq_large.{}.jsonl.gz"),
}


@dataclass(frozen=True)
class Measured:
    """One set. Recall is the mean share of a question's gold facts among the first k, by k."""

    name: str
    questions: int
    left_out: int
    entities: int
    facts: int
    gold: float
    build_seconds: float
    by_rank: dict[int, float]
    by_retriever: dict[int, float]


def bare_questions(source: Path, target: Path) -> None:
    """Writes the questions of a file without their subgraphs."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(source, "rt", encoding="utf-8") as lines, target.open("w") as out:
        for line in lines:
            row = json.loads(line)
            out.write(json.dumps({key: row[key] for key in KEYS if key in row}) + "\n")


def gold_facts(graph: Graph, questions: Sequence[Question]) -> list[set[int]]:
    """The facts of the whole graph on the walks of each question's gold relation paths."""
    rows = {graph.entities[row]: row for row in range(graph.num_entities)}
    relations = {graph.relations[row]: row for row in range(len(graph.relations))}
    facts = (graph.head, graph.relation, graph.tail)
    found = []
    for question in questions:
        relevance = fact_relevance(
            question,
            facts,
            node_of=rows,
            relation_of=relations,
            topics=[rows[name] for name in question.topics if name in rows],
            answers=[rows[name] for name in question.answers if name in rows],
        )
        found.append(set(np.flatnonzero(relevance.bits & RELATION_PATH).tolist()))
    return found


def recall_by_rank(
    graph: Graph, questions: Sequence[Question], gold: Sequence[set[int]]
) -> dict[int, float]:
    """Recall of cuts of each size."""
    recall = {}
    for k in KEPT:
        cutter = Cutter(graph, CutOptions(max_facts=k))
        shares = []
        for question, facts in zip(questions, gold, strict=True):
            topics = [find_name(graph.entities, name) for name in question.topics]
            kept = set(cutter([row for row in topics if row is not None]).tolist())
            shares.append(len(facts & kept) / len(facts))
        recall[k] = float(np.mean(shares))
    return recall


def recall_by_retriever(
    graph: Graph, run: Path, file: Path, gold: dict[str, set[int]]
) -> dict[int, float]:
    """Recall of the facts that a trained retriever ranks first within the subgraphs of a file."""
    shares: dict[int, list[float]] = {k: [] for k in KEPT}
    for question, prediction in load_run(run).predictions(file):
        facts = gold.get(question.id)
        if not facts:
            continue
        wanted = set(graph.triples(sorted(facts)))
        for k in KEPT:
            kept = {question.triples[i] for i in prediction.ranked[:k]}
            shares[k].append(len(wanted & kept) / len(wanted))
    return {k: float(np.mean(values)) for k, values in shares.items()}


def measure(name: str, work: Path, args: argparse.Namespace) -> Measured:
    """Builds, trains and ranks one set."""
    graph_name, pattern = SETS[name]
    data, folder = Path(os.environ["DRAGKIT_DATA"]), work / graph_name
    for split in ("train", "test"):
        source = folder / "questions" / f"{split}.jsonl"
        if not source.exists():
            bare_questions(data / pattern.format(split), source)
    graph_file = data / "kb" / f"{graph_name}.tsv.gz"
    began = time.monotonic()
    built = folder / f"built-{args.facts}"
    build(
        BuildSettings(
            questions=str(folder / "questions"),
            output=built,
            graph=(graph_file,),
            max_facts=args.facts,
        )
    )
    seconds = time.monotonic() - began
    run = folder / f"run-{args.facts}-{args.epochs}"
    if not (run / "best").exists():
        train(built / "train.jsonl.gz", run, args.epochs)
    graph = open_graph([graph_file])
    questions = read_questions(built / "test.jsonl.gz").questions
    gold = gold_facts(graph, questions)
    asked = [q for q, facts in zip(questions, gold, strict=True) if facts]
    wanted = [facts for facts in gold if facts]
    return Measured(
        name=name,
        questions=len(asked),
        left_out=len(questions) - len(asked),
        entities=graph.num_entities,
        facts=graph.num_facts,
        gold=float(np.median([len(facts) for facts in wanted])),
        build_seconds=seconds,
        by_rank=recall_by_rank(graph, asked, wanted),
        by_retriever=recall_by_retriever(
            graph,
            run,
            built / "test.jsonl.gz",
            {q.id: facts for q, facts in zip(asked, wanted, strict=True)},
        ),
    )


def rebuild(graph_name: str, name: str, work: Path, facts: int) -> str:
    """Builds all splits of a set, and returns its row of the table."""
    data = Path(os.environ["DRAGKIT_DATA"])
    questions, output = work / "sets" / name, work / f"rebuilt-{facts}" / name
    for source in sorted(data.glob(f"{name}.*.jsonl.gz")):
        target = questions / source.name.removesuffix(".gz").removeprefix(f"{name}.")
        if not target.exists():
            bare_questions(source, target)
    graph = (data / "kb" / f"{graph_name}.tsv.gz",)
    build(BuildSettings(questions=str(questions), output=output, graph=graph, max_facts=facts))
    counts = BuildFolder(output).join().counts
    number = counts["questions"]
    shares = (counts["topic_in_subgraph"] / number, counts["answer_in_subgraph"] / number)
    cells = " | ".join(f"{100 * share:.1f}" for share in shares)
    return f"| {name} | {number:,} | {facts:,} | {counts['facts'] / number:,.0f} | {cells} |"


def train(file: Path, run: Path, epochs: int) -> None:
    """Trains phase 1 without validation questions. A stopped run goes on."""
    command = [sys.executable, "-m", "dragkit.train", "--phase", "1", "--preset", "tiny"]
    command += ["--heuristics_path", str(file), "--epochs", str(epochs)]
    command += ["--checkpoint_dir", str(run)]
    command += ["--resume"] if run.exists() else []
    subprocess.run(command, check=True)


def document(
    measured: Sequence[Measured], rebuilt: Sequence[str], args: argparse.Namespace, plot: str
) -> str:
    """The page."""
    lines = [
        "# Gold facts among the first k of a whole graph",
        "",
        "Made by `python scripts/whole_graphs.py`, "
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, "
        f"{os.cpu_count()} cores, {platform.machine()}.",
        "",
        "The questions lost their subgraphs and got new ones from the whole knowledge base, with "
        f"`python -m dragkit.data build --max-facts {args.facts}`. Neither the cut nor the split "
        "looks at answers. A retriever of the tiny preset trained on the train questions, for "
        f"{args.epochs} epochs.",
        "",
        "A gold fact lies on a walk of a gold relation path from a topic to an answer in the whole "
        "graph. *PageRank* keeps the k facts of highest rank. *Retriever* keeps the k best of the "
        f"{args.facts:,} facts of the subgraph, so it cannot exceed the last column of PageRank. "
        "Each figure is the mean over the test questions of the share of gold facts kept, in "
        "percent.",
        "",
        "| set | facts chosen by | " + " | ".join(f"k = {k:,}" for k in KEPT) + " |",
        "| --- | --- |" + " ---: |" * len(KEPT),
    ]
    for m in measured:
        for label, recall in (("PageRank", m.by_rank), ("retriever", m.by_retriever)):
            cells = " | ".join(f"{100 * recall[k]:.1f}" for k in KEPT)
            lines.append(f"| {m.name} | {label} | {cells} |")
    lines += ["", f"![Recall of gold facts against facts kept]({plot})", ""]
    for m in measured:
        left = f" {m.left_out} without a gold fact in the graph are left out." if m.left_out else ""
        lines.append(
            f"- {m.name}: {m.questions} test questions over {m.entities:,} entities and "
            f"{m.facts:,} facts. The median question has {m.gold:.0f} gold facts.{left} "
        )
    lines += [
        "",
        "## Every set, rebuilt",
        "",
        "All questions of all splits with new subgraphs from the whole graph, of 50 and of "
        "2,000 facts at most. In percent of the questions: some topic is in the subgraph, and some "
        "answer is, which is the most that a reader can get.",
        "",
        "| set | questions | at most | facts, mean | topic | answer |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *rebuilt,
        "",
        "The sets are small reconstructions of the published ones, so the figures are not "
        "comparable with published ones.",
    ]
    return "\n".join(_wrapped(line) for line in lines) + "\n"


def _wrapped(line: str) -> str:
    return line if line.startswith(("|", "!", "#")) else textwrap.fill(line, 120)


def draw(measured: Sequence[Measured], path: Path) -> None:
    """Writes the plot as SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "whole_graphs", "font.size": 9}):
        figure = Figure((3.4 * len(measured), 3), facecolor="white", layout="constrained")
        panels = figure.subplots(1, len(measured), sharey=True, squeeze=False)[0]
        for axes, m in zip(panels, measured, strict=True):
            for label, recall, style in (
                ("PageRank", m.by_rank, "s--"),
                ("retriever", m.by_retriever, "o-"),
            ):
                values = [100 * recall[k] for k in KEPT]
                axes.plot(KEPT, values, style, label=label, markersize=4)
            axes.set(title=m.name, xscale="log", xlabel="facts kept", ylim=(0, 101))
            axes.set_xticks(KEPT, [f"{k:,}" for k in KEPT])
            axes.minorticks_off()
            axes.grid(True, linewidth=0.3)
        panels[0].set_ylabel("gold facts kept, percent")
        panels[0].legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "whole_graphs.md")
    args = parser.parse_args()
    work = cache_root() / "whole_graphs"
    measured = [measure(name, work, args) for name in SETS]
    rebuilt = [
        rebuild(graph, name, work, facts)
        for graph, names in REBUILT.items()
        for name in names
        for facts in (50, 2000)
    ]
    plot = args.output.with_suffix(".svg")
    draw(measured, plot)
    args.output.write_text(document(measured, rebuilt, args, plot.name), encoding="utf-8")


if __name__ == "__main__":
    main()
