"""Builds the demo's question files, into the cache or into a given folder.

The tables, the templates and one seed determine every byte on every machine.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dragkit.data.cache import cache_root, commit_folder
from dragkit.demo.kb import Fact, KnowledgeBase, facts_on_path, load_knowledge_base, package_text
from dragkit.demo.questions import DemoQuestion, Wording, draw, parse_templates
from dragkit.demo.subgraph import FactRanker
from dragkit.errors import WriteError

logger = logging.getLogger(__name__)

# This is part of the cache key. Raise it when the code writes other files.
BUILDER_VERSION = 1
SEED = 20_241
SIZES = {"train": 2400, "dev": 320, "test": 520}
SUBGRAPH_FACTS = 50
# Questions per ranking. It bounds the memory of the dense [facts, questions] flows.
_QUESTIONS_PER_RANKING = 128


class DemoFiles(NamedTuple):
    """Paths of the three question files."""

    train: Path
    dev: Path
    test: Path


def demo_files(cache_dir: str | Path | None = None) -> DemoFiles:
    """Builds the demo set into the cache if it is not there, and returns its files.

    Args:
        cache_dir: cache folder. None takes `$DRAGKIT_CACHE`, else `~/.cache/dragkit`.

    Raises:
        WriteError: the cache cannot be written.
    """
    folder = cache_root(cache_dir) / "demo" / _content_key()
    if not folder.is_dir():
        logger.info("building the demo set in %s", folder)
        commit_folder(folder, _write)
    return _files(folder)


def build_demo(out_dir: str | Path) -> DemoFiles:
    """Writes train.jsonl, dev.jsonl and test.jsonl into a folder, which it creates if missing.

    Raises:
        WriteError: the folder or a file cannot be written.
    """
    _fill(Path(out_dir), _write)
    return _files(Path(out_dir))


class DemoSource(NamedTuple):
    """Paths of the knowledge base and of the questions without subgraphs."""

    graph: Path
    questions: Path


def write_source(out_dir: str | Path) -> DemoSource:
    """Writes kg.tsv and qa.jsonl into a folder, which it creates if missing.

    The first holds all facts of the demo. The second holds its questions as a user would have them:
    text, answers and split, without topics and subgraphs.

    Raises:
        WriteError: the folder or a file cannot be written.
    """
    source = DemoSource(Path(out_dir) / "kg.tsv", Path(out_dir) / "qa.jsonl")

    def write(folder: Path) -> None:
        kb = load_knowledge_base()
        with source.graph.open("w", encoding="utf-8", newline="\n") as out:
            out.writelines("\t".join(fact) + "\n" for fact in kb.facts)
        _write_questions(kb, source.questions)

    _fill(Path(out_dir), write)
    return source


def _write_questions(kb: KnowledgeBase, path: Path) -> None:
    rng = random.Random(SEED)
    templates = parse_templates(package_text("templates.tsv")["templates.tsv"])
    wording = Wording(kb)
    splits = draw(kb, templates, list(SIZES.values()), rng)
    with path.open("w", encoding="utf-8", newline="\n") as out:
        for split, questions in zip(SIZES, splits, strict=True):
            for number, question in enumerate(questions):
                row = {
                    "id": f"demo-{split}-{number:04d}",
                    "question": wording.write(question, rng),
                    "answer": list(question.answers),
                    "split": split,
                }
                out.write(json.dumps(row, ensure_ascii=False) + "\n")


def _fill(folder: Path, write: Callable[[Path], None]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder)
    except OSError as error:
        raise WriteError(
            f"{folder}: cannot write the demo: {error.strerror or error}. Change the folder."
        ) from error


def _files(folder: Path) -> DemoFiles:
    return DemoFiles(*(folder / f"{name}.jsonl" for name in SIZES))


def _write(folder: Path) -> None:
    kb = load_knowledge_base()
    rng = random.Random(SEED)
    templates = parse_templates(package_text("templates.tsv")["templates.tsv"])
    ranker, wording = FactRanker(kb), Wording(kb)
    splits = draw(kb, templates, list(SIZES.values()), rng)
    for name, questions in zip(SIZES, splits, strict=True):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as out:
            for row in _rows(kb, ranker, wording, questions, name, rng):
                out.write(json.dumps(row, ensure_ascii=False) + "\n")


def _content_key() -> str:
    """Hash of the tables, the templates and the constants."""
    texts = package_text("tables") | package_text("templates.tsv") | package_text("articles.tsv")
    content = json.dumps([BUILDER_VERSION, SEED, SIZES, SUBGRAPH_FACTS, texts])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _rows(
    kb: KnowledgeBase,
    ranker: FactRanker,
    wording: Wording,
    questions: Sequence[DemoQuestion],
    split: str,
    rng: random.Random,
) -> Iterator[dict[str, object]]:
    """Yields the rows of one split. Training subgraphs always hold the gold facts."""
    for start in range(0, len(questions), _QUESTIONS_PER_RANKING):
        batch = questions[start : start + _QUESTIONS_PER_RANKING]
        keys = np.array([rng.getrandbits(64) for _ in batch], dtype=np.uint64)
        topics = [question.topics for question in batch]
        order, reached = ranker.rank(topics, keys, SUBGRAPH_FACTS)
        for number, question in enumerate(batch, start):
            best = [kb.facts[index] for index in order[number - start]]
            # dev and test hold only what the ranking finds, as a real subgraph would.
            gold_facts = question.gold_facts() if split == "train" else []
            triples = list(dict.fromkeys([*gold_facts, *best]))[:SUBGRAPH_FACTS]
            # Unshuffled, the gold facts of train would come first.
            rng.shuffle(triples)
            yield {
                "id": f"demo-{split}-{number:04d}",
                "dataset": "demo",
                "question": wording.write(question, rng),
                "answer": list(question.answers),
                "topic_entities": list(question.topics),
                "hops": max(len(chain) for chain in question.template.chains),
                "qtype": question.template.text,
                **_gold(question, triples),
                "gold_forced": not set(best).issuperset(gold_facts),
                "graph_size": int(reached[number - start]),
                "triples": triples,
            }


def _gold(question: DemoQuestion, triples: Sequence[Fact]) -> dict[str, object]:
    """The gold paths and answers that the subgraph holds."""
    present = set(triples)
    paths_inside: list[tuple[str, ...]] = []
    chains: dict[tuple[str, ...], None] = {}
    for paths, chain in zip(question.paths, question.template.chains, strict=True):
        kept = [path for path in paths if present.issuperset(facts_on_path(path, chain))]
        paths_inside.extend(kept)
        if kept:
            chains[chain] = None
    names = {name for head, _, tail in triples for name in (head, tail)}
    num_answers_inside = sum(answer in names for answer in question.answers)
    return {
        "paths": paths_inside,
        "relation_paths": list(chains),
        "gold_paths_total": sum(map(len, question.paths)),
        "answer_in_subgraph": num_answers_inside > 0,
        "answers_in_subgraph": num_answers_inside,
    }
