"""A file of questions, packed once into a cache folder and memory-mapped from then on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dragkit.data.arrays import (
    CorruptCache,
    Strings,
    cache_key,
    open_or_build,
    open_sealed,
    read_array,
    remembered_digest,
)
from dragkit.data.cache import cache_root
from dragkit.data.evidence import EVIDENCE, RELATION_PATH
from dragkit.data.file_packing import pack_file
from dragkit.data.gaps import LabelGaps, describe_unread
from dragkit.data.labels import LabelRule
from dragkit.data.lines import open_source
from dragkit.data.packing import ARRAYS, FACT_PAIR, RAGGED
from dragkit.data.question_file import default_id
from dragkit.data.question_row import Triple
from dragkit.errors import DataError

logger = logging.getLogger(__name__)

# Part of every fingerprint. Raise it when the same file is packed into other values.
BUILDER_VERSION = 2
# Change this name when arrays or counts are renamed or added. Checkpoints record the fingerprint,
# so a new BUILDER_VERSION for the same values would prevent runs from being resumed.
CACHE_FOLDER = "packed-6"

# What the log says of a count of `PackedStore.summary` that is not zero.
_REMARKS = {
    "no_answer": "questions have no answer, so they teach the generator nothing and score 0",
    "other_answers": "questions have other answers under `answers` than under `answer`. Those "
    "under `answer` count alone",
    "empty_question": "questions are empty",
    "blank_names": "facts have an empty entity or an empty relation",
    "topics_from_paths": "questions name no topic entity, so the first entity of each of their "
    "paths is used",
    "topic_missing": "questions have no topic entity in their graph, so their search starts from "
    "all nodes with equal probability",
}


@dataclass(frozen=True, slots=True)
class StoredQuestion:
    """A question in names. Its facts are in the order of the packed arrays.

    Attributes:
        id, text, topics, answers, line: values of the file.
        entities: names of the nodes.
        triples: (head, relation, tail) names of the facts.
        labels: 1 for each positive fact, else 0.
        topic_nodes: nodes of the topics that are in the graph.
        evidence: positions of the facts that are evidence, None if the file gives none.
        relation_path_facts: positions of the facts on a walk along a relation path, None if the
            file gives none.
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
    evidence: tuple[int, ...] | None
    relation_path_facts: tuple[int, ...] | None


class PackedStore:
    """Read access to a packed file. `build_or_open` makes one.

    Args:
        folder: a sealed cache folder.
        path: the file that was packed, for ids and messages.

    Attributes:
        fingerprint: hex key of the file's content, the options and the builder.
        summary: counts of questions, facts, labels and rejected rows, by name.
        label_gaps: why questions have no positive fact.
        unread: keys that are not read where their question lacks what they seem to mean.
        facts, merged_facts, merged_segments, merged_pairs, topic_facts, topic_segments,
            topic_pairs, topic_nodes: int32 blocks of all questions end to end, see `Packer`.
        fact_ptr, node_ptr, merged_fact_ptr, ...: int64 [Q+1] first item of each question.
        labels: uint8 [E].
        relevance, judged: uint8 [E] and [Q] bits of facts and questions, see `FactRelevance`.
        question_key: int64 [Q] counter word of each question's noise.
    """

    def __init__(self, folder: Path, path: Path) -> None:
        meta = open_sealed(folder)
        self.folder, self.path = folder, path
        self.fingerprint = folder.name
        self.summary: dict[str, int] = dict(meta["summary"])  # type: ignore[call-overload]
        try:
            self.label_gaps = LabelGaps(**meta["label_gaps"])  # type: ignore[arg-type]
            self.unread: list[tuple[str, str, int]] = meta["unread"]  # type: ignore[assignment]
        except KeyError as error:
            # A new builder version would change the fingerprint, and no old run could be resumed.
            raise CorruptCache(f"an earlier version wrote it, without {error}") from error
        for name in ARRAYS:
            setattr(self, name, read_array(folder, name))
        # Every question of every batch looks its offsets up, so they are held in memory.
        for name in RAGGED:
            setattr(self, f"{name}_ptr", np.array(read_array(folder, f"{name}_ptr")))
        self.question_key = np.array(self.question_key)
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
        """Opens the packed form of a file. Packs the file first if the cache does not hold it.

        The key depends on the file's content, the options and the builder's version. It does not
        depend on the file's name or date. A damaged cache folder is rebuilt.

        Args:
            path: JSONL of questions, plain or gzip.
            cache_dir: cache folder. None takes the user's.
            label_rule: see `fact_labels`.
            max_bad_fraction: fraction of unusable rows that may be left out. They are counted.
            merge: merge nodes that the retriever cannot tell apart, see `merge_nodes`.

        Raises:
            DataError, MissingInputError: see `read_questions`.
            WriteError: the cache cannot be written.
        """
        path = Path(path)
        open_source(path).close()
        before = path.stat()
        options = (label_rule, float(max_bad_fraction), merge)
        cache = cache_root(cache_dir)
        key = cache_key(BUILDER_VERSION, remembered_digest(path, cache / "digests"), *options)
        folder = cache / CACHE_FOLDER / key

        def fill(target: Path) -> None:
            logger.info("packing %s", path)
            pack_file(
                path, target, label_rule=label_rule, max_bad_fraction=max_bad_fraction, merge=merge
            )
            # A file that was removed meanwhile is no fault of the cache.
            open_source(path).close()
            after = path.stat()
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise DataError(f"{path}: the file changed while it was read. Start again.")

        store = open_or_build(folder, lambda: cls(folder, path), fill)
        store._log_warnings()
        return store

    def _log_warnings(self) -> None:
        if rejects := self.summary["rejects"]:
            logger.warning(
                "%s: skipped %d of %d rows as unusable. %s gives the reasons",
                self.path,
                rejects,
                self.summary["rows"],
                self.folder / "rejects.txt",
            )
        if keys := describe_unread(self.unread):
            logger.warning(
                "%s: keys that are not read, in questions that lack what they seem to mean: %s",
                self.path,
                keys,
            )
        if without := self.summary["labels_none"]:
            logger.warning(
                "%s: %d of %d questions have no positive fact, so retrieval learns nothing from "
                "them: %s",
                self.path,
                without,
                len(self),
                self.label_gaps,
            )
        for name, remark in _REMARKS.items():
            if count := self.summary.get(name, 0):
                total = self.summary["facts" if remark.startswith("facts") else "questions"]
                logger.warning("%s: %d of %d %s", self.path, count, total, remark)

    def __len__(self) -> int:
        return len(self.question_key)

    @cached_property
    def relation_names(self) -> tuple[str, ...]:
        """All relations, by row."""
        return tuple(self._relations.slice(0, len(self._relations)))

    @property
    def num_relations(self) -> int:
        """Number of relations in the data set."""
        return len(self._relations)

    @cached_property
    def _given_ids(self) -> frozenset[str]:
        return frozenset(self._ids.slice(0, len(self)))

    @cached_property
    def fact_counts(self) -> np.ndarray:
        """int64 [Q] number of facts of each question."""
        return np.diff(self.fact_ptr)

    def question_id(self, row: int) -> str:
        """Returns the id of one question."""
        given = self._ids[row]
        return given or default_id(self.path, int(self.lines[row]), self._given_ids)

    def num_facts(self, row: int) -> int:
        """Returns the number of facts of one question."""
        return int(self.fact_counts[row])

    @property
    def question_texts(self) -> list[str]:
        """The questions, by row."""
        return self._texts.slice(0, len(self))

    def answers(self, row: int) -> tuple[str, ...]:
        """Returns the gold answers of one question."""
        return tuple(self._answers.slice(*self.answer_ptr[row : row + 2].tolist()))

    def block(self, name: str, row: int) -> np.ndarray:
        """Returns one question's block, int32 [height, items], see `Packer`.

        Args:
            name: "facts", "merged_facts" or "merged_pairs".
            row: the question.
        """
        height = {"facts": 4, "merged_facts": 9, "merged_pairs": 2}[name]
        start, stop = getattr(self, f"{name[:-1]}_ptr")[row : row + 2].tolist()
        return getattr(self, name)[height * start : height * stop].reshape(height, stop - start)

    def question(self, row: int) -> StoredQuestion:
        """Returns one question in names.

        Raises:
            IndexError: the store has no such row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} questions")
        entities = self._entities.slice(*self.node_ptr[row : row + 2].tolist())
        head, tail, merged_fact, _ = self.block("facts", row)
        pair = self.block("merged_facts", row)[FACT_PAIR][merged_fact]
        relation = self.block("merged_pairs", row)[1][pair]
        facts = (head.tolist(), relation.tolist(), tail.tolist())
        names = self.relation_names
        topics = tuple(self._topics.slice(*self.topic_ptr[row : row + 2].tolist()))
        return StoredQuestion(
            id=self.question_id(row),
            text=self._texts[row],
            topics=topics,
            answers=self.answers(row),
            line=int(self.lines[row]),
            entities=tuple(entities),
            triples=tuple(
                (entities[h], names[r], entities[t]) for h, r, t in zip(*facts, strict=True)
            ),
            labels=tuple(self.labels[self.fact_ptr[row] : self.fact_ptr[row + 1]].tolist()),
            topic_nodes=tuple(entities.index(name) for name in topics if name in entities),
            evidence=self._relevant(row, EVIDENCE),
            relation_path_facts=self._relevant(row, RELATION_PATH),
        )

    def _relevant(self, row: int, bit: int) -> tuple[int, ...] | None:
        """Positions of a question's facts that have a bit of `relevance`, None if not judged."""
        if not self.judged[row] & bit:
            return None
        relevance = self.relevance[self.fact_ptr[row] : self.fact_ptr[row + 1]]
        return tuple(np.flatnonzero(relevance & bit).tolist())
