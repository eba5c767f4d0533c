"""What a build found, in a few lines."""

from __future__ import annotations

from pathlib import Path

from dragkit.data.build.parts import Part

_TRAIN = ("train",)
_DEV = ("dev", "val", "valid", "validation")


def summary(folder: Path, total: Part) -> str:
    """Describes the files of questions of a build.

    Args:
        folder: the output.
        total: the sum of its parts.
    """
    counts, splits = total.counts, total.splits
    questions = max(counts["questions"], 1)

    def share(name: str, what: str) -> str:
        count = counts.get(name, 0)
        return f"  {count:>10,}  {100 * count / questions:5.1f} %  {what}" if count else ""

    lines = [
        f"{folder}: {counts['questions']:,} questions with {counts['facts']:,} facts",
        *(f"  {folder / f'{name}.jsonl.gz'}: {count:,}" for name, count in splits.items()),
        share("answer_in_subgraph", "have an answer in their subgraph, the most a reader can get"),
        share("answer_in_graph_alone", "have an answer in the graph, but not in their subgraph"),
        share("without_answer", "have no answer"),
        share("linked", "have topics that were found in their text"),
        share("without_topic", "have no topic"),
        share("missing_topic", "name a topic that is not in the graph: see missing_topics.txt"),
        share("without_facts", "have no facts"),
    ]
    train = next((name for name in splits if name in _TRAIN), None)
    dev = next((name for name in splits if name in _DEV), None)
    if train is not None:
        validation = f" --val_heuristics_path {folder / dev}.jsonl.gz" if dev else ""
        lines.append(
            "Train a retriever:\n  python -m dragkit.train --phase 1 --heuristics_path "
            f"{folder / train}.jsonl.gz{validation}"
        )
    return "\n".join(line for line in lines if line)
