"""A heuristics file packed once into a cache folder and read by memory map from then on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dragkit.data.arrays import (
    Strings,
    cache_key,
    file_digest,
    open_or_build,
    open_sealed,
    read_array,
)
from dragkit.data.cache import cache_root
from dragkit.data.labels import LabelRule
from dragkit.data.lines import open_source
from dragkit.data.packing import FACT_PAIR, RAGGED, pack_file
from dragkit.data.question_file import Triple, default_id
from dragkit.errors import DataError

logger = logging.getLogger(__name__)

# Part of every key: raise it whenever the same file would be packed differently.
BUILDER_VERSION = 2

_ARRAYS = (
    *("facts", "edges", "classes", "pairs", "start_edges", "start_classes", "start_pairs"),
    *("labels", "topic_classes", "lines"),
)


@dataclass(frozen=True, slots=True)
class StoredQuestion:
    """A question as people read it; its facts are in the order of the packed arrays.

    Attributes:
        id, text, topics, answers, line: as in the file.
        entities: names of the nodes; triples: names of the facts; labels: 1 where positive.
        topic_nodes: nodes of those topics that are in the graph.
    """

    id: str
    text: str
    topics: tuple[str, ...]
    answers: tuple[str, ...]
    line: int
    entities: tuple[str, ...]
    triples: tuple[Triple, ...]
    labels: tuple[int, ...]
    topic_nodes: tuple[int, ...]


class PackedStore:
    """Read access to a packed file; made by `build_or_open`.

    Args:
        folder: a sealed cache folder; path: the file it was made from (for ids and messages).

    Attributes:
        fingerprint: hex key of the file's content, the options and the builder.
        summary: counts of what the file holds and of what was left out.
        facts, edges, classes, pairs, start_edges, start_classes, start_pairs: int32 blocks of all
            questions end to end, see `Packer`.
        fact_ptr, node_ptr, edge_ptr, ...: int64 [Q+1] first item of each question.
        labels: uint8 [E]; topic_classes: int32; question_key: int64 [Q].
    """

    def __init__(self, folder: Path, path: Path) -> None:
        meta = open_sealed(folder)
        self.folder, self.path = folder, path
        self.fingerprint = folder.name
        self.summary: dict[str, int] = dict(meta["summary"])  # type: ignore[call-overload]
        for name in _ARRAYS:
            setattr(self, name, read_array(folder, name))
        # Offsets are looked up for every question of every batch: they are worth the memory.
        for name in RAGGED:
            setattr(self, f"{name}_ptr", np.array(read_array(folder, f"{name}_ptr")))
        self.question_key = np.array(read_array(folder, "question_key"))
        self._ids = Strings(folder, "ids")
        self._texts = Strings(folder, "texts")
        self._topics = Strings(folder, "topics")
        self._answers = Strings(folder, "answers")
        self._entities = Strings(folder, "entities")
        self._relations = Strings(folder, "relations")

    def __reduce__(self) -> tuple[type[PackedStore], tuple[Path, Path]]:
        # Loader processes map the files again instead of receiving the arrays.
        return PackedStore, (self.folder, self.path)

    @classmethod
    def build_or_open(
        cls,
        path: str | Path,
        *,
        cache_dir: str | Path | None = None,
        label_rule: LabelRule = "auto",
        max_bad_fraction: float = 0.0,
        merge: bool = True,
    ) -> PackedStore:
        """Opens the packed form of a file, and packs it first where that was not yet done.

        The key is made of the file's content, the options and the builder's version, never of the
        file's name or date. A folder that was damaged is packed anew.

        Args:
            path: heuristics JSONL, plain or gzip.
            cache_dir: where packed sets are kept; None takes the user's cache folder.
            label_rule: see `fact_labels`; max_bad: share of unusable rows to leave out and count.
            merge: share the states of nodes that cannot be told apart, see `merge_nodes`.

        Raises:
            DataError, MissingInputError: as `read_questions`.
            WriteError: the cache cannot be written.
        """
        path = Path(path)
        open_source(path).close()
        before = path.stat()
        key = cache_key(
            BUILDER_VERSION, file_digest(path), label_rule, float(max_bad_fraction), merge
        )
        folder = cache_root(cache_dir) / "packed" / key

        def fill(target: Path) -> None:
            logger.info("packing %s", path)
            pack_file(
                path, target, label_rule=label_rule, max_bad_fraction=max_bad_fraction, merge=merge
            )
            after = path.stat()
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise DataError(f"{path}: changed while it was being read. Start again.")

        store = open_or_build(folder, lambda: cls(folder, path), fill)
        store._tell()
        return store

    def _tell(self) -> None:
        if rejects := self.summary["rejects"]:
            logger.warning(
                "%s: %d of %d rows are unusable and left out; %s says why",
                self.path,
                rejects,
                self.summary["rows"],
                self.folder / "rejects.txt",
            )
        if missing := self.summary["topic_missing"]:
            logger.warning(
                "%s: %d questions have no topic entity in their graph; "
                "their search starts from all nodes alike",
                self.path,
                missing,
            )

    def __len__(self) -> int:
        return len(self.question_key)

    @cached_property
    def relation_names(self) -> tuple[str, ...]:
        """All relations, by row."""
        return tuple(self._relations.slice(0, len(self._relations)))

    @property
    def num_relations(self) -> int:
        """Relations of the data set."""
        return len(self._relations)

    @cached_property
    def fact_counts(self) -> np.ndarray:
        """int64 [Q] facts of each question."""
        return np.diff(self.fact_ptr)

    def num_facts(self, row: int) -> int:
        """Facts of one question."""
        return int(self.fact_counts[row])

    @property
    def question_texts(self) -> list[str]:
        """The questions, by row."""
        return self._texts.slice(0, len(self))

    def answers(self, row: int) -> tuple[str, ...]:
        """Gold answers of one question."""
        return tuple(self._answers.slice(*self.answer_ptr[row : row + 2].tolist()))

    def block(self, name: str, row: int) -> np.ndarray:
        """int32 [height, items] one of `facts`, `edges`, `pairs` of a question, see `Packer`."""
        height = {"facts": 4, "edges": 9, "pairs": 2}[name]
        first, last = getattr(self, f"{name[:-1]}_ptr")[row : row + 2].tolist()
        return getattr(self, name)[height * first : height * last].reshape(height, last - first)

    def question(self, row: int) -> StoredQuestion:
        """Everything about one question in words.

        Raises:
            IndexError: no such row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} questions")
        entities = self._entities.slice(*self.node_ptr[row : row + 2].tolist())
        head, tail, edge, _ = self.block("facts", row)
        pair = self.block("edges", row)[FACT_PAIR][edge]
        relation = self.block("pairs", row)[1][pair]
        facts = (head.tolist(), relation.tolist(), tail.tolist())
        names = self.relation_names
        topics = tuple(self._topics.slice(*self.topic_ptr[row : row + 2].tolist()))
        line = int(self.lines[row])
        return StoredQuestion(
            id=self._ids[row] or default_id(self.path, line),
            text=self._texts[row],
            topics=topics,
            answers=self.answers(row),
            line=line,
            entities=tuple(entities),
            triples=tuple(
                (entities[h], names[r], entities[t]) for h, r, t in zip(*facts, strict=True)
            ),
            labels=tuple(self.labels[self.fact_ptr[row] : self.fact_ptr[row + 1]].tolist()),
            topic_nodes=tuple(entities.index(name) for name in topics if name in entities),
        )
