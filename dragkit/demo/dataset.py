"""Builds the files of the demo question set, once into the cache or into a folder of choice.

Questions, splits, wordings and subgraphs follow from the tables, the templates and one seed: the
same bytes on every machine.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dragkit.data.cache import cache_root, commit_folder
from dragkit.demo.kb import Fact, KnowledgeBase, load_knowledge_base, package_text, walked_facts
from dragkit.demo.questions import Asked, Wording, draw, parse_templates
from dragkit.demo.subgraph import FactRanker
from dragkit.errors import WriteError

logger = logging.getLogger(__name__)

# Part of the cache key: raise it with every change of the code that changes the files.
BUILDER_VERSION = 1
SEED = 20_241
SIZES = {"train": 2400, "dev": 320, "test": 520}
SUBGRAPH_FACTS = 50
_RANK_BATCH = 128


class DemoFiles(NamedTuple):
    """Paths of the three splits, in the format of the heuristics files."""

    train: Path
    dev: Path
    test: Path


def demo_files(cache_dir: str | Path | None = None) -> DemoFiles:
    """The bundled demo set; built into the cache on first use.

    Args:
        cache_dir: the cache folder; by default `$DRAGKIT_CACHE`, else `~/.cache/dragkit`.

    Raises:
        WriteError: the cache cannot be written.
    """
    folder = cache_root(cache_dir) / "demo" / _content_key()
    if not folder.is_dir():
        logger.info("building the demo set in %s", folder)
        commit_folder(folder, _write)
    return _files(folder)


def build_demo(out_dir: str | Path) -> DemoFiles:
    """Writes train.jsonl, dev.jsonl and test.jsonl into a folder, made where it is missing.

    Raises:
        WriteError: the folder or a file cannot be written.
    """
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder)
    except OSError as error:
        raise WriteError(
            f"{folder}: cannot write the demo set: {error.strerror or error}. Name another folder."
        ) from error
    return _files(folder)


def _files(folder: Path) -> DemoFiles:
    return DemoFiles(*(folder / f"{name}.jsonl" for name in SIZES))


def _write(folder: Path) -> None:
    kb = load_knowledge_base()
    rng = random.Random(SEED)
    templates = parse_templates(package_text("templates.tsv")["templates.tsv"])
    ranker, wording = FactRanker(kb), Wording(kb)
    splits = draw(kb, templates, list(SIZES.values()), rng)
    for name, asked in zip(SIZES, splits, strict=True):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as out:
            for row in _rows(kb, ranker, wording, asked, name, rng):
                out.write(json.dumps(row, ensure_ascii=False) + "\n")


def _content_key() -> str:
    """A hash of all that the files are made from."""
    texts = package_text("tables") | package_text("templates.tsv") | package_text("articles.tsv")
    content = json.dumps([BUILDER_VERSION, SEED, SIZES, SUBGRAPH_FACTS, texts])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _rows(
    kb: KnowledgeBase,
    ranker: FactRanker,
    wording: Wording,
    asked: Sequence[Asked],
    split: str,
    rng: random.Random,
) -> Iterator[dict[str, object]]:
    """The lines of one split; only in train are gold facts put into the subgraphs."""
    for start in range(0, len(asked), _RANK_BATCH):
        batch = asked[start : start + _RANK_BATCH]
        keys = np.array([rng.getrandbits(64) for _ in batch], dtype=np.uint64)
        topics = [question.topics for question in batch]
        order, reached = ranker.rank(topics, keys, SUBGRAPH_FACTS)
        for place, question in enumerate(batch, start):
            best = [kb.facts[index] for index in order[place - start]]
            forced = question.gold_facts() if split == "train" else []
            triples = list(dict.fromkeys([*forced, *best]))[:SUBGRAPH_FACTS]
            rng.shuffle(triples)
            yield {
                "id": f"demo-{split}-{place:04d}",
                "dataset": "demo",
                "question": wording.write(question, rng),
                "answer": list(question.answers),
                "topic_entities": list(question.topics),
                "hops": max(len(chain) for chain in question.template.chains),
                "qtype": question.template.text,
                **_gold(question, triples),
                "gold_forced": not set(best).issuperset(forced),
                "graph_size": int(reached[place - start]),
                "triples": triples,
            }


def _gold(asked: Asked, triples: Sequence[Fact]) -> dict[str, object]:
    """What of the truth lies in the subgraph."""
    present = set(triples)
    inside: list[tuple[str, ...]] = []
    chains: dict[tuple[str, ...], None] = {}
    for paths, chain in zip(asked.paths, asked.template.chains, strict=True):
        kept = [path for path in paths if present.issuperset(walked_facts(path, chain))]
        inside.extend(kept)
        if kept:
            chains[chain] = None
    names = {name for head, _, tail in triples for name in (head, tail)}
    found = sum(answer in names for answer in asked.answers)
    return {
        "paths": inside,
        "relation_paths": list(chains),
        "gold_paths_total": sum(map(len, asked.paths)),
        "answer_in_subgraph": found > 0,
        "answers_in_subgraph": found,
    }
