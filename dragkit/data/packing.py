"""Writes a heuristics file into a folder of arrays: many questions are sorted in one go."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from dragkit.data.arrays import FolderWriter, seal_folder
from dragkit.data.labels import LabelRule
from dragkit.data.node_merging import MergedGraph, merge_nodes
from dragkit.data.question_file import Question, QuestionReader
from dragkit.data.relations import RelationVocab
from dragkit.data.subgraph import Subgraph, build_subgraph
from dragkit_kernels import build_fact_index

logger = logging.getLogger(__name__)

# One sort for about this many facts: its fixed cost vanishes, its memory stays small.
_CHUNK_FACTS = 1 << 18
_CHUNK_QUESTIONS = 1 << 13


def question_key(name: str) -> int:
    """The counter word of a question's noise: 63 bits of a hash of its id."""
    digest = hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


# Names of the ragged arrays. Each has offsets `<name>_ptr`.
RAGGED = (
    *("fact", "node", "edge", "class", "pair", "start_edge", "start_pair"),
    *("topic", "topic_class", "answer"),
)
# The parts of a `FactIndex` that are stored: rows of each fact, ends of each node's two segments,
# and end and relation of each pair, all counted from the question's own zero.
PER_FACT = ("head", "tail", "tail_perm", "head_perm", "pair_perm", "fact_pair")
COUNTS = ("head_count", "tail_count")
FACT_PAIR = PER_FACT.index("fact_pair")


class _Segments:
    """Items of some graphs end to end: how many each has, its first, and the graph of every item.

    Args:
        count: int [G].
    """

    def __init__(self, count: np.ndarray) -> None:
        self.count = count
        self.base = np.cumsum(count) - count
        self.owner = np.repeat(np.arange(len(count)), count)

    @classmethod
    def sorted(cls, owner: np.ndarray, num_graphs: int) -> _Segments:
        """From the ascending graph of every item."""
        return cls(np.bincount(owner, minlength=num_graphs))

    @classmethod
    def of(cls, owner: np.ndarray, group: np.ndarray, num_graphs: int) -> _Segments:
        """Of groups of items, none across graphs, numbered by first member."""
        first = np.zeros(int(group.max(initial=-1)) + 1, dtype=np.int64)
        first[group] = owner
        return cls.sorted(first, num_graphs)


class Packer:
    """Takes questions one by one and appends them to the arrays of a folder.

    Every question gets blocks, counted from its own zero, so that a pack is made by adding offsets
    to whole blocks. E facts on N nodes become Q merged facts on M classes (see `merge_nodes`); S of
    those touch a topic, the only ones whose sender has a share of the distribution when a stage
    starts.

        facts [4, E]: head node, tail node, merged fact, facts in the order of merged facts
        edges [9, Q]: of `FactIndex` head, tail, tail_perm, head_perm, pair_perm, fact_pair,
            head_count, tail_count; end of the facts of each
        classes [3, M]: end of each class's tail and head segment, nodes in the class
        pairs [2, P]: end of each pair's segment, relation row
        start_edges [8, S], start_classes [2, M], start_pairs [2, P']: the same for the start
    """

    def __init__(self, folder: Path, label_rule: LabelRule, *, merge: bool = True) -> None:
        self.vocab = RelationVocab()
        self.summary: Counter[str] = Counter()
        self.label_rule: LabelRule = label_rule
        self.merge = merge
        self._writer = FolderWriter(folder)
        self._waiting: list[Subgraph] = []
        self._waiting_facts = 0
        for name in RAGGED:
            self._writer.array(f"{name}_ptr", np.int64).append([0])
        self._ends: Counter[str] = Counter()

    def _extend(self, name: str, counts: np.ndarray | list[int]) -> None:
        """Appends rows of `counts` items to the offsets `<name>_ptr`."""
        ends = np.cumsum(counts, dtype=np.int64) + self._ends[name]
        self._writer.array(f"{name}_ptr", np.int64).append(ends)
        self._ends[name] += int(np.sum(counts))

    def add(self, question: Question, *, named: bool) -> None:
        """Appends one question; `named` says that its id stood in the file.

        A made-up id holds the file's name, which is no part of the content: it is stored as an
        empty string and its noise key comes from the line number alone.
        """
        graph = build_subgraph(question, self.vocab, label_rule=self.label_rule)
        writer = self._writer
        writer.strings("ids").append([question.id if named else ""])
        writer.strings("texts").append([question.text])
        writer.strings("topics").append(question.topics)
        writer.strings("answers").append(question.answers)
        writer.strings("entities").append(graph.names)
        writer.array("lines", np.int64).append([question.line])
        key = question_key(question.id if named else f"\n{question.line}")
        writer.array("question_key", np.int64).append([key])
        self._extend("topic", [len(question.topics)])
        self._extend("answer", [len(question.answers)])
        self._note(graph)
        self._waiting.append(graph)
        self._waiting_facts += graph.num_facts
        if self._waiting_facts >= _CHUNK_FACTS or len(self._waiting) >= _CHUNK_QUESTIONS:
            self._flush()

    def _note(self, graph: Subgraph) -> None:
        for name, amount in (
            ("nodes", graph.num_nodes),
            ("facts", graph.num_facts),
            ("positive_facts", int(graph.label.sum())),
            ("answer_in_graph", len(graph.answers) > 0),
            ("topic_missing", graph.num_nodes > 0 and len(graph.topics) == 0),
            ("labels_shortest", graph.label_source == "shortest"),
            ("labels_paths", graph.label_source == "paths"),
            ("labels_none", graph.label_source == "none"),
        ):
            self.summary[name] += int(amount)

    def _flush(self) -> None:
        """Sorts the waiting subgraphs as one pack, then takes the offsets out again."""
        graphs, self._waiting, self._waiting_facts = self._waiting, [], 0
        if not graphs:
            return
        nodes = _Segments(np.array([graph.num_nodes for graph in graphs]))
        facts = _Segments(np.array([graph.num_facts for graph in graphs]))
        shifted = list(zip(graphs, nodes.base, strict=True))
        head, tail, topics = (
            np.concatenate([getattr(g, end) + first for g, first in shifted])
            for end in ("head", "tail", "topics")
        )
        mark = np.zeros(len(nodes.owner), dtype=bool)
        mark[topics] = True
        relation = np.concatenate([graph.relation for graph in graphs])
        merged = merge_nodes(head, tail, relation, nodes.owner, mark, merge=self.merge)
        classes = _Segments.of(nodes.owner, merged.merged_node, len(graphs))
        edges = _Segments.of(facts.owner, merged.merged_fact, len(graphs))
        by_edge = np.argsort(merged.merged_fact, kind="stable")
        edge_end = np.cumsum(np.bincount(merged.merged_fact, minlength=len(edges.owner)))
        # Where a graph has no topic its search starts from all nodes alike.
        mark |= ~np.isin(nodes.owner, nodes.owner[topics])
        started = np.zeros(len(classes.owner), dtype=bool)
        started[merged.merged_node[mark]] = True

        fact_block = [
            head - nodes.base[facts.owner],
            tail - nodes.base[facts.owner],
            merged.merged_fact - edges.base[facts.owner],
            by_edge - facts.base[facts.owner],
        ]
        self._blocks("facts", fact_block, facts)
        self._extend("fact", facts.count)
        self._extend("node", nodes.count)
        self._extend("class", classes.count)
        every = np.ones(len(edges.owner), dtype=bool)
        sizes = [merged.size]
        self._index_blocks(
            "", merged, every, edges, classes, [edge_end - facts.base[edges.owner]], sizes
        )
        near = started[merged.head] | started[merged.tail]
        starting = _Segments(np.bincount(edges.owner[near], minlength=len(graphs)))
        self._index_blocks("start_", merged, near, starting, classes, [], [])
        topic_class = np.flatnonzero(started)
        owner = classes.owner[topic_class]
        self._writer.array("topic_classes", np.int32).append(topic_class - classes.base[owner])
        self._extend("topic_class", np.bincount(owner, minlength=len(graphs)))
        labels = np.concatenate([graph.label for graph in graphs])
        self._writer.array("labels", np.uint8).append(labels)
        self.summary["classes"] += len(classes.owner)
        self.summary["merged_facts"] += len(edges.owner)

    def _index_blocks(
        self,
        prefix: str,
        merged: MergedGraph,
        chosen: np.ndarray,
        edges: _Segments,
        classes: _Segments,
        edge_columns: list[np.ndarray],
        class_columns: list[np.ndarray],
    ) -> None:
        """Sorts the chosen merged facts and appends their blocks, with some columns more."""
        columns = {
            name: torch.from_numpy(getattr(merged, name)[chosen])
            for name in ("head", "tail", "relation", *COUNTS)
        }
        fact_index = build_fact_index(
            columns["head"],
            columns["tail"],
            columns["relation"],
            len(classes.owner),
            torch.from_numpy(edges.owner),
            **{name: columns[name] for name in COUNTS},
        )
        pairs = _Segments.sorted(fact_index.pair_graph.numpy(), len(edges.count))
        # Segments of a graph's nodes and pairs cover exactly its own facts, so a row of the sorted
        # orders belongs to the graph of the fact that stands in the same place.
        base = {"head": classes, "tail": classes, "fact_pair": pairs}
        block = [
            getattr(fact_index, name).numpy() - base.get(name, edges).base[edges.owner]
            for name in PER_FACT
        ]
        block += [getattr(fact_index, name).numpy() for name in COUNTS]
        self._blocks(f"{prefix}edges", [*block, *edge_columns], edges)
        self._extend(f"{prefix}edge", edges.count)
        ends = [
            ptr.numpy()[1:] - edges.base[classes.owner]
            for ptr in (fact_index.tail_ptr, fact_index.head_ptr)
        ]
        self._blocks(f"{prefix}classes", [*ends, *class_columns], classes)
        pair_end = fact_index.pair_ptr.numpy()[1:] - edges.base[pairs.owner]
        self._blocks(f"{prefix}pairs", [pair_end, fact_index.pair_relation.numpy()], pairs)
        self._extend(f"{prefix}pair", pairs.count)

    def _blocks(self, name: str, rows: list[np.ndarray], segments: _Segments) -> None:
        """Appends every graph's part of some rows as one block."""
        stacked = np.stack(rows).astype(np.int32)
        pieces = [
            stacked[:, first : first + size].ravel()
            for first, size in zip(segments.base.tolist(), segments.count.tolist(), strict=True)
        ]
        self._writer.array(name, np.int32).append(np.concatenate(pieces))

    def close(self) -> None:
        """Writes what is waiting and finishes the files."""
        self._flush()
        self._writer.strings("relations").append(self.vocab.names)
        self._writer.close()


def pack_file(
    path: Path, folder: Path, *, label_rule: LabelRule, max_bad_fraction: float, merge: bool
) -> None:
    """Reads, labels, sorts and seals a heuristics file.

    Args:
        path: the file.
        folder: an empty folder to fill.
        label_rule: see `fact_labels`.
        max_bad: share of unusable rows to leave out.
        merge: see `merge_nodes`.

    Raises:
        DataError, MissingInputError: as `read_questions`.
    """
    reader = QuestionReader(path)
    packer = Packer(folder, label_rule, merge=merge)
    for question in reader:
        # A file that will be refused is still read to its end, for the whole list of faults.
        if max_bad_fraction > 0 or not reader.rejects:
            packer.add(question, named=question.line not in reader.unnamed)
    packer.close()
    reader.check(max_bad_fraction)
    rejects = reader.rejects
    if rejects:
        (folder / "rejects.txt").write_text("".join(f"{problem}\n" for problem in rejects))
    summary = {**reader.notes, **packer.summary}
    summary |= {"relations": len(packer.vocab), "rejects": len(rejects), "rows": reader.rows}
    seal_folder(folder, {"summary": summary})
