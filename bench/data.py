"""The questions that benchmarks run on: published sets if they are found, or else the demo."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch_geometric.data import Data

from dragkit.config import TrainConfig, resolve_config
from dragkit.data.packed import QuestionBatch
from dragkit.generator.generator import Generator
from dragkit.generator.prompt import NeuralPrompt
from dragkit.joint import JointModel
from dragkit.retriever.text_encoder import TextEncoder, find_encoder
from dragkit.trainer.question_dataset import QuestionDataset

# Published sets are looked for beside the repository, or in DRAGKIT_DATA.
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SMALL, LARGE = "webqsp.train", "webqsp_cwq_large.train"


@dataclass(frozen=True, slots=True)
class BenchFile:
    """A heuristics file and the name of its set."""

    path: Path
    name: str


def question_file(name: str, cache_dir: Path) -> BenchFile:
    """The published set `name`, or the training questions of the bundled demo."""
    folder = Path(os.environ.get("DRAGKIT_DATA", DATA))
    for suffix in (".jsonl.gz", ".jsonl"):
        if (folder / f"{name}{suffix}").is_file():
            return BenchFile(folder / f"{name}{suffix}", name)
    from dragkit.demo import demo_files

    return BenchFile(Path(demo_files(cache_dir).train), "demo.train")


def graph_file(name: str) -> Path | None:
    """The published graph `name`, None if it is not found."""
    path = Path(os.environ.get("DRAGKIT_DATA", DATA)) / "kb" / f"{name}.tsv.gz"
    return path if path.is_file() else None


def raw_questions(path: Path) -> list[dict]:
    """The lines of a heuristics file as dictionaries, for contenders that work on strings."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def bench_config(phase: int, **overrides: object) -> TrainConfig:
    """C = 256, K = 2, L = 3, T = 2 without dropout. `section__key=value` overrides a setting."""
    settings: dict[str, object] = {
        "run.phase": phase,
        "run.device": "cpu",
        "run.compile": False,
        "retriever.hidden_dim": 256,
        "retriever.num_instructions": 2,
        "retriever.num_reasoning_steps": 3,
        "retriever.num_stages": 2,
        # Only without dropout can the results of contenders agree.
        "retriever.dropout": 0.0,
        "generator.model": "tiny",
        "sampler.k_facts": 10,
        "optim.lr": 1e-5,
    }
    settings |= {key.replace("__", "."): value for key, value in overrides.items()}
    return resolve_config(overrides=settings)[0]


def text_encoder(cache_dir: Path) -> TextEncoder:
    """all-MiniLM-L6-v2."""
    return TextEncoder(find_encoder(), cache_dir)


def question_source(
    file: BenchFile, config: TrainConfig, cache_dir: Path, generator: Generator | None, batch: int
) -> QuestionDataset:
    """The packed questions of a file, as the trainer reads them."""
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"cache_dir": str(cache_dir)})}
    )
    return QuestionDataset(file.path, config, text_encoder(cache_dir), generator, batch)


def whole_batches(source: QuestionDataset, size: int, count: int) -> list[list[int]]:
    """Rows of `count` batches of exactly `size` questions, which repeat if the set is small.

    Raises:
        ValueError: the set is smaller than one batch.
    """
    if len(source) < size:
        raise ValueError(
            f"{source.path}: holds {len(source)} questions, but a batch needs {size}; "
            "use a larger set"
        )
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0)).tolist()
    # The last rows that fill no batch are dropped, so that all steps process as many questions.
    order = order[: len(order) // size * size]
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    return [batches[i % len(batches)] for i in range(count)]


def pyg_questions(source: QuestionDataset, rows: Sequence[int]) -> dict[int, Data]:
    """The same questions as PyG graphs, by row."""
    relation_ids = {name: i for i, name in enumerate(source.store.relation_names)}
    return {row: _as_pyg(source, row, relation_ids) for row in rows}


def _as_pyg(source: QuestionDataset, row: int, relation_ids: Mapping[str, int]) -> Data:
    batch, store = source.collator([row]), source.store
    question = store.question(row)
    head, tail = torch.from_numpy(store.block("facts", row)[:2].astype("int64"))
    topic = torch.zeros(len(question.entities))
    # Without a topic entity every node is one.
    topic_nodes = list(question.topic_nodes) or list(range(len(topic)))
    topic[topic_nodes] = 1 / max(len(topic_nodes), 1)
    return Data(
        edge_index=torch.stack([head, tail]),
        edge_type=torch.tensor([relation_ids[name] for _, name, _ in question.triples]),
        topic=topic,
        label=batch.graph.label,
        states=batch.question_states[0][batch.question_mask[0]],
        num_nodes=len(topic),
    )


@torch.no_grad()
def best_facts_prompt(
    joint: JointModel, source: QuestionDataset, rows: Sequence[int], *, with_target: bool
) -> tuple[NeuralPrompt, Tensor]:
    """Prompts with the facts that the retriever scores best.

    Returns:
        The prompts as one pack, and the vectors of their slots, float [B * K, M].
    """
    device = joint.generator.device
    batch = source.collator(list(rows)).to(device)
    output = joint.retriever(batch, source.relations.to(device))
    selection = joint.fact_sampler.best(output.fact_logits, batch.graph)
    prompt = joint.prompt(batch, selection.index, with_target=with_target)
    return prompt, joint.structural_vectors(output, batch, selection).flatten(0, 1)


def sizes(batch: QuestionBatch) -> dict[str, int]:
    """The sizes of a batch, for the tables."""
    graph = batch.graph
    return {
        "questions": graph.num_graphs,
        "nodes": int(graph.node_count.sum()),
        "facts": graph.num_facts,
        "merged to nodes": graph.num_nodes,
        "merged to facts": graph.fact_index.num_facts,
        "relations": len(batch.relation_row),
        "pairs": graph.fact_index.num_pairs,
    }
